"""The commands that are compared, each doing W' = W_finetuned + gamma (W_aligned - W_base).

Ours is the real `realign repair`; mergekit is its own command in an environment of its own; the
naive script and the floor stand beside this file. Start-up commands import what the contender
imports and do nothing, because a user pays for that as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.streaming.measure import HERE, Command

GAMMA = 0.5
MERGEKIT = "0.1.5"
CONSTRAINTS = HERE.parents[1] / "constraints.txt"


def realign(*arguments: str) -> tuple[str, ...]:
    """The installed command."""
    return (str(Path(sys.executable).with_name("realign")), *arguments)


_OUR_IMPORTS = """\
import realign_cli.main
from realign_cli.imports import swift_imports
with swift_imports():
    import realign.repair.engine
"""

FIRST = "realign, first run"


def ours(
    family: Path, output: Path | None, *, method: str = "resta", first: bool = False
) -> Command:
    """The real command; without an output it is a dry run.

    Args:
        family: the three checkpoints.
        output: its folder.
        method: of the repair.
        first: with an empty cache, so that the inputs are hashed; otherwise their hashes are those
            that an earlier run has kept.
    """
    last = ("--dry-run",) if output is None else ("--out", str(output))
    argv = realign(
        *("repair", str(family / "finetuned")),
        *("--aligned", str(family / "aligned"), "--base", str(family / "base")),
        *("--method", method, "--safety-vector", "base", "--device", "cpu"),
        *(("--set", f"gamma={GAMMA}") if method == "resta" else ()),
        *("--json", "--quiet", "--offline"),
        *last,
    )
    if first:
        assert output is not None
        cache = f'REALIGN_CACHE=$(mktemp -d -p "{output.parent}")'
        return Command(FIRST, ("sh", "-c", f'{cache} exec "$0" "$@"', *argv), output)
    return Command("dry run" if output is None else "realign", argv, output)


def naive(family: Path, output: Path) -> Command:
    """Three models loaded with transformers, differences in float32."""
    roles = [str(family / role) for role in ("base", "aligned", "finetuned")]
    argv = (sys.executable, str(HERE / "naive.py"), *roles, str(output), str(GAMMA))
    return Command("naive", argv, output)


def floor(family: Path, output: Path, *, chunk: int, hashed: bool) -> Command:
    """The same reads and the same write, nothing else."""
    roles = [str(family / role) for role in ("base", "aligned", "finetuned")]
    argv = (sys.executable, "-I", "-S", str(HERE / "floor.py"), *roles, str(output), str(chunk))
    name = "floor + SHA-256" if hashed else "floor"
    return Command(name, (*argv, *(["--sha256"] if hashed else [])), output)


def mergekit(family: Path, output: Path, *, python: Path, exact: bool) -> Command:
    """mergekit's `task_arithmetic`.

    Args:
        family: the three checkpoints.
        output: its folder; the configuration is written beside it.
        python: the interpreter of mergekit's environment.
        exact: compute in float32 and store bfloat16; otherwise all in bfloat16, as its own examples
            are configured.
    """
    config = output.with_name(f"{output.name}.yml")
    config.parent.mkdir(parents=True, exist_ok=True)
    types = "dtype: float32\nout_dtype: bfloat16" if exact else "dtype: bfloat16"
    config.write_text(
        f"""\
merge_method: task_arithmetic
base_model: {family / "base"}
models:
  - model: {family / "finetuned"}
    parameters: {{weight: 1.0}}
  - model: {family / "aligned"}
    parameters: {{weight: {GAMMA}}}
parameters: {{normalize: false}}
{types}
"""
    )
    command = str(python.with_name("mergekit-yaml"))
    name = "mergekit, float32" if exact else "mergekit"
    return Command(name, (command, str(config), str(output)), output)


def start_ups(python: Path | None) -> list[Command]:
    """Interpreter and imports of each contender."""
    commands = [
        Command(
            "realign",
            (sys.executable, "-P", "-c", _OUR_IMPORTS),
        ),
        Command(
            "naive",
            (sys.executable, "-P", "-c", "import torch; from transformers import LlamaForCausalLM"),
        ),
        Command("floor", (sys.executable, "-I", "-S", "-c", "import hashlib, concurrent.futures")),
    ]
    if python is not None:
        code = (
            "import mergekit.scripts.run_yaml, mergekit.merge;"
            "from transformers import LlamaForCausalLM"
        )
        commands.append(Command("mergekit", (str(python), "-P", "-c", code)))
    return commands


def mergekit_environment(folder: Path) -> Path:
    """Make mergekit's environment where it is not there yet; returns its interpreter.

    torch and everything else that both need are held at our versions, so that the libraries are the
    same on both sides.
    """
    python = folder / "bin" / "python"
    ready = folder / f".mergekit-{MERGEKIT}"
    if ready.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    constraints = CONSTRAINTS.read_text("utf-8").splitlines()
    torch = next(line for line in constraints if line.startswith("torch=="))
    # torch first and alone, and from its own index where one is named, as in the Makefile.
    index = os.environ.get("TORCH_INDEX")
    pip: Sequence[str | Path] = (python, "-m", "pip", "--quiet", "install", "-c", CONSTRAINTS)
    subprocess.run([*pip, *(["--index-url", index] if index else []), torch], check=True)
    subprocess.run([*pip, f"mergekit=={MERGEKIT}"], check=True)
    ready.touch()
    return python
