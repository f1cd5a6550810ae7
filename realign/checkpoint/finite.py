"""Finding NaN and infinity in weight files before anything is computed with them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from realign.checkpoint.headers import FLOATS, read_header
from realign.checkpoint.names import role_of
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.scan import all_finite
from realign.errors import NonFiniteError
from realign.progress import SILENT, Progress


def check_finite(files: Iterable[Path], *, progress: Progress = SILENT) -> None:
    """Read every floating-point tensor once, in chunks; buffers may hold infinity (stored masks).

    Raises:
        NonFiniteError: a tensor holds NaN or infinity; the message names tensor and file.
    """
    for file in files:
        tensors = read_header(file).tensors.values()
        reader = TensorFiles()
        try:
            with progress.task(
                f"check {file.name}", total=sum(info.nbytes for info in tensors), unit="B"
            ) as task:
                for info in tensors:
                    if (
                        info.dtype in FLOATS
                        and role_of(info).kind != "buffer"
                        and not all(all_finite(chunk) for chunk in reader.chunks(info))
                    ):
                        raise NonFiniteError(
                            f"{info.name} in {file} holds NaN or infinity",
                            "find the training or merging step that produced it",
                        )
                    task.advance(info.nbytes)
        finally:
            reader.close()
