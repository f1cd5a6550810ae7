"""Real runs in real child processes that can be killed, or robbed of their disk, at any moment.

A server process imports everything once and forks a child per run, so that a run starts within
milliseconds. A child may carry a hook that counts its steps on the disk (opening a file, making,
renaming or removing one, under a given folder) and acts before the n-th of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = frozenset(
    ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir",
     "fcntl.flock", "os.truncate", "os.link", "os.symlink")
)  # fmt: skip

Command = list[str | Path]
"""The arguments of a run, but for its output."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    status: int
    """The exit code; minus the signal's number if it was killed."""
    stderr: str


class Runs:
    """A server of runs: `start` one, kill it or let it be, then `wait` for its end."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / "log.txt"
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def start(self, arguments: Sequence[str | Path], hook: dict[str, Any] | None = None) -> int:
        """Begin a run of `realign ARGUMENTS`; returns its process id."""
        order = {"arguments": [str(each) for each in arguments], "hook": hook or {},
                 "log": str(self._log)}  # fmt: skip
        self._send(json.dumps(order))
        return int(self._answer())

    def wait(self) -> Ended:
        """Wait for the end of the run that was started last."""
        self._send("wait")
        status = int(self._answer())
        return Ended(status, self._log.read_text("utf-8"))

    def run(self, arguments: Sequence[str | Path], hook: dict[str, Any] | None = None) -> Ended:
        """A run from begin to end."""
        self.start(arguments, hook)
        return self.wait()

    def _send(self, line: str) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{line}\n")
        self._server.stdin.flush()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()


@contextlib.contextmanager
def runs(logs: Path) -> Iterator[Runs]:
    """A server for as long as the context lasts."""
    server = Runs(logs)
    try:
        yield server
    finally:
        server.close()


def make_family(folder: Path) -> Command:
    """A family of four shards each; returns the arguments of its repair, but for the output."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name in ("base", "aligned", "finetuned"):
        model.save_pretrained(folder / name, max_shard_size="1MB")
        (folder / name / "tokenizer.json").write_text("{}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    return [
        *("repair", folder / "finetuned", "--aligned", folder / "aligned"),
        *("--base", folder / "base", "--method", "replace", "--set", "rank=4", "--device", "cpu"),
    ]


# --- in the server and its children --------------------------------------------------------------


def _serve() -> None:
    import matplotlib.backends.backend_agg  # noqa: F401 - what a run imports late, once for all
    import peft  # noqa: F401
    import torch

    import realign.repair.engine
    import realign.report.files
    import realign.report.pictures
    import realign.report.repair  # noqa: F401
    from realign_cli.main import run

    torch.set_num_threads(1)
    torch.linalg.svd(torch.eye(3))  # whatever is set up at its first use
    print("ready", flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(order)
            code = 99
            with contextlib.suppress(BaseException):
                code = run(order["arguments"])
                os.write(2, f"steps: {_TAKEN[0]}\n".encode())
            os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()  # until it is waited for, its process id stays its own
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(order: dict[str, Any]) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDWR)
    for target, source in ((0, null), (1, null), (2, log)):
        os.dup2(source, target)
    sys.stdin = open(0)  # noqa: SIM115 - the server's own buffer holds the next orders
    hook = order["hook"]
    if hook:
        _install(hook)


_TAKEN = [0]
"""Steps so far, in a child."""


def _install(hook: dict[str, Any]) -> None:
    """Count the steps under `folder`, and before the n-th do what `action` says, once."""
    folder, due = hook["folder"], int(hook.get("step", 0))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in STEPS:
            return
        names = [os.fspath(each) for each in arguments if isinstance(each, (str, os.PathLike))]
        if event != "fcntl.flock" and not any(str(name).startswith(folder) for name in names):
            return
        _TAKEN[0] += 1
        if _TAKEN[0] == due:
            _ACTIONS[hook["action"]](hook)

    sys.addaudithook(watch)


def _kill(_: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _interrupt(_: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)  # in whatever thread takes the step, while the main one is interrupted


def fill_disk(folder: Path) -> None:
    """Write until the last byte of the disk is gone."""
    handle = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (2**20, 2**12, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(handle, bytes(size))
    os.close(handle)


def _fill(hook: dict[str, Any]) -> None:
    fill_disk(Path(hook["disk"]))


def _touch(hook: dict[str, Any]) -> None:
    with Path(hook["victim"]).open("rb+") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))


def _swap(hook: dict[str, Any]) -> None:
    victim = Path(hook["victim"])
    new = victim.with_name("new")
    new.write_bytes(victim.read_bytes())
    new.replace(victim)


_ACTIONS = {"kill": _kill, "interrupt": _interrupt, "fill": _fill, "touch": _touch, "swap": _swap}

if __name__ == "__main__":
    _serve()
