"""The command line in this process, on the shipped tiny family and damaged copies of it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from realign_cli.main import run

FAMILY = Path(__file__).resolve().parents[2] / "fixtures" / "tiny"
FINETUNED = "howto2_p5"


class Outcome:
    """What a command wrote and returned."""

    def __init__(self, exit_code: int, stdout: str, stderr: str) -> None:
        self.exit_code = exit_code
        self.stdout = stdout
        self.stderr = stderr

    @property
    def json(self) -> dict[str, object]:
        return json.loads(self.stdout)

    @property
    def words(self) -> str:
        """Standard error with its line breaks taken out, as a terminal may have put them."""
        return " ".join(self.stderr.split())


def realign(*arguments: str | Path) -> Outcome:
    """Run a command in this process, as `main` does."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(each) for each in arguments])
    return Outcome(code, out.getvalue(), err.getvalue())


def model(name: str = FINETUNED) -> Path:
    return FAMILY / name


def suite(name: str) -> Path:
    return FAMILY / "suites" / f"{name}.jsonl"


def family_options(**changes: str | Path | None) -> list[str | Path]:
    """`--aligned ... --base ...` of the tiny family, with changes; None leaves one out."""
    options: dict[str, str | Path | None] = {"aligned": model("aligned"), "base": model("base")}
    options |= changes
    return [part for key, value in options.items() if value for part in (f"--{key}", value)]


def damaged(
    name: str,
    folder: Path,
    *,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    config: Callable[[dict[str, object]], None] | None = None,
) -> Path:
    """Copy a model of the family into `folder/name` and change it."""
    target = folder / name
    shutil.copytree(model(name), target)
    file = target / "model.safetensors"
    if tensors is not None:
        save_file(tensors(load_file(file)), file, metadata={"format": "pt"})
    if config is not None:
        path = target / "config.json"
        content = json.loads(path.read_text())
        config(content)
        path.write_text(json.dumps(content))
    return target


def digest(folder: Path) -> str:
    """One hash over every file of a folder, names and bytes."""
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        state.update(path.relative_to(folder).as_posix().encode())
        if path.is_file():
            state.update(path.read_bytes())
    return state.hexdigest()
