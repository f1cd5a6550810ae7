"""The read-write floor: the same three reads and one write as a repair, and no arithmetic.

    python -I -S floor.py BASE ALIGNED FINETUNED OUT CHUNK_BYTES [--sha256]

Every weight file is read in all three folders, in chunks, into two sets of buffers; the fine-tune's
bytes are written and flushed to the disk with fsync. Reading one chunk overlaps with writing the
one before. With --sha256 every byte that is read or written is hashed too, as a manifest needs, on
as many threads as there are cores. Standard library only, so that there is next to no start-up in
it.
"""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Passage:
    """Bytes that pass, hashed or not."""

    def __init__(self, path: str, flags: int, hashed: bool) -> None:
        self.handle = os.open(path, flags, 0o644)
        self.digest = hashlib.sha256() if hashed else None

    def read(self, buffer: memoryview) -> int:
        """Fill the buffer as far as the file goes."""
        done = 0
        while done < len(buffer):
            count = os.readv(self.handle, [buffer[done:]])
            if not count:
                break
            done += count
        if self.digest:
            self.digest.update(buffer[:done])
        return done

    def write(self, buffer: memoryview) -> None:
        """Append all of it."""
        if self.digest:
            self.digest.update(buffer)
        while len(buffer):
            buffer = buffer[os.write(self.handle, buffer) :]

    def close(self) -> None:
        """Close the file."""
        os.close(self.handle)


def main() -> None:
    *folders, out, chunk = [each for each in sys.argv[1:] if each != "--sha256"]
    hashed = "--sha256" in sys.argv
    size = int(chunk)
    Path(out).mkdir()
    names = sorted(file.name for file in Path(folders[-1]).glob("*.safetensors"))
    sets = [[memoryview(bytearray(size)) for _ in folders] for _ in range(2)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for name in names:
            inputs = [Passage(f"{each}/{name}", os.O_RDONLY, hashed) for each in folders]
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            output = Passage(f"{out}/{name}", flags, hashed)
            written, turn = None, 0
            while True:
                buffers = sets[turn]
                reads = [pool.submit(each.read, buf) for each, buf in zip(inputs, buffers)]  # noqa: B905
                counts = [each.result() for each in reads]
                if written:
                    written.result()
                if not any(counts):
                    break
                written = pool.submit(output.write, buffers[-1][: counts[-1]])
                turn = 1 - turn
            os.fsync(output.handle)
            for each in (*inputs, output):
                each.close()


if __name__ == "__main__":
    main()
