"""The sweep over every causal language model of the installed transformers: `make sweep`.

Each architecture runs in a process of its own, forked from one that has the libraries loaded, so
that a crash or a hang costs one row. Results are kept as one JSON file per architecture under a
key of the code and the versions: a second run does what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing as mp
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 240.0
"""Seconds for one architecture."""
VISION_LANGUAGE = (
    "llava", "qwen2_vl", "qwen2_5_vl", "paligemma", "idefics3", "smolvlm", "internvl", "mistral3",
    "qwen3_vl", "llava_next",
)  # fmt: skip


def entries() -> list[str]:
    """The mapping's entries in its order, then the vision-language ones."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VISION_LANGUAGE]


def code_key() -> str:
    """One hash over everything a result depends on."""
    import torch
    import transformers

    state = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    files = [
        *(ROOT / "realign").rglob("*.py"),
        *(ROOT / "cli").rglob("*.py"),
        *(ROOT / "tests" / "architectures").glob("*.py"),
    ]
    for file in sorted(files):
        if file.name not in {"page.py", "sweep.py"} and not file.name.startswith("test_"):
            state.update(file.read_bytes())
    return state.hexdigest()[:16]


def results_folder() -> Path:
    """Where results are kept."""
    home = os.environ.get("REALIGN_SWEEP") or str(ROOT / ".cache" / "sweep")
    return Path(home)


def read_result(folder: Path, name: str, *, key: str, keep: bool) -> dict[str, Any] | None:
    """The stored result of an architecture; None where there is none of this code."""
    try:
        stored: dict[str, Any] = json.loads((folder / f"{name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return stored if keep or stored.get("key") == key else None


def work(name: str, number: int, target: Path, key: str) -> None:
    """In the child: examine one architecture and write its result."""
    from dataclasses import asdict

    import torch
    from architectures.examine import examine

    from realign.report import repair as drawing

    torch.set_num_threads(1)
    drawing.repair_picture = lambda *_: None  # drawing is half of the time
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    start = time.monotonic()
    try:
        record = asdict(examine(name, folder, number=number))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record |= {"key": key, "seconds": round(time.monotonic() - start, 1)}
    partial = target.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1, sort_keys=True), "utf-8")
    partial.replace(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, write the page; 1 where a repair failed a check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these architectures")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep results of other code")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "architectures.md")
    parser.add_argument("--no-page", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    import architectures.examine  # noqa: F401 (loaded once, before the forks)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    key, folder, every = code_key(), results_folder(), entries()
    folder.mkdir(parents=True, exist_ok=True)
    names = options.names or every
    missing = [
        name for name in names if read_result(folder, name, key=key, keep=options.keep) is None
    ]
    if options.names and not options.keep:
        missing = names
    _run(missing, every, folder, key, workers=options.workers)
    results = [read_result(folder, name, key=key, keep=True) for name in every]
    print(Counter(each["status"] for each in results if each), file=sys.stderr)
    if not options.no_page and all(results):
        from architectures.page import write_page

        write_page(options.page, [each for each in results if each])
    return int(any(each and each["status"] == "failed" for each in results))


def _run(missing: list[str], every: list[str], folder: Path, key: str, *, workers: int) -> None:
    context = mp.get_context("fork")
    waiting, running, done = list(missing), {}, 0
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            number = every.index(name) if name in every else 0
            target = folder / f"{name}.json"
            target.unlink(missing_ok=True)
            process = context.Process(target=work, args=(name, number, target, key))
            with contextlib.suppress(BrokenPipeError):
                sys.stdout.flush()
            process.start()
            running[name] = (process, time.monotonic(), target)
        for name, (process, start, target) in list(running.items()):
            process.join(timeout=0.2)
            late = time.monotonic() - start > TIME_LIMIT
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
                process.join()
            del running[name]
            done += 1
            if not target.exists():
                what = "took too long" if late else f"the process ended with {process.exitcode}"
                failed = {"model_type": name, "status": "failed", "reason": what, "key": key}
                target.write_text(json.dumps(failed), "utf-8")
            result = json.loads(target.read_text("utf-8"))
            print(
                f"{done}/{len(missing)} {name}: {result['status']} "
                f"{'+'.join(result.get('methods', []))} {result.get('reason', '')[:230]} "
                f"[{result.get('seconds', 0)} s]",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
