"""All spectral benchmarks, one after the other; what is finished is not measured again.

    python -m benchmarks.spectra [--work DIR] [--into docs/data] [--small]

Each part runs in a process of its own with one thread per library, and leaves its figures in the
work folder; delete that folder to measure again. docs/data/bench-spectra.json is written last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.spectra.alone import environment

FULL = {
    "ranks": ["--scale", "384"],
    "scan": [],
    "edit_pass": [],
    "family": [],
}
SMALL = {
    "ranks": ["--scale", "24"],
    "scan": ["--shapes", "96x96", "96x384", "--repeats", "1"],
    "edit_pass": ["--shapes", "64x64", "32x64", "96x64", "64x96", "--tokens", "300"],
    "family": ["--layers", "1", "--hidden", "64", "--ffn", "96", "--kv", "32",
               "--vocabulary", "50", "--repeats", "1"],
}  # fmt: skip


def measured(part: str, options: Sequence[str], work: Path) -> dict[str, Any] | None:
    """The figures of one part, from the work folder or by running it; None if it fails."""
    stored = work / f"{part}.json"
    if not stored.exists():
        command = [sys.executable, "-m", f"benchmarks.spectra.{part}", *options]
        print(f"{part} ...", file=sys.stderr)
        done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True)
        if not done.stdout.strip():
            print(f"{part} failed with exit code {done.returncode}", file=sys.stderr)
            return None
        json.loads(done.stdout)
        stored.write_text(done.stdout, "utf-8")
    return json.loads(stored.read_text("utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the record; exit code 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench-spectra"))
    parser.add_argument("--into", type=Path, default=Path("docs/data"))
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the scripts")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    choice = SMALL if options.small else FULL
    parts = {part: measured(part, extra, options.work) for part, extra in choice.items()}

    from benchmarks.spectra.record import record
    from benchmarks.streaming.machine import machine

    found = record(parts, machine())
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (options.into / "bench-spectra.json").write_text(text, "utf-8")
    for target in found["targets"]:
        verdict = {None: "not yet measured", True: "met", False: "NOT met"}[target["met"]]
        print(
            f"{target['what']}: {target['measured'] or '-'} (target {target['target']}): {verdict}"
        )
    return 1 if None in parts.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
