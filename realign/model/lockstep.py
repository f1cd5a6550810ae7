"""Several forward passes side by side, one decoder block at a time.

Each pass runs in a thread of its own and stops at the entrance of every block until all others are
there, so that all texts have been through one block before the next is touched. The model's own
code runs unchanged, whatever a block is called with. Exactly one thread runs at any time, in a
fixed order and with the caller's number of threads per operation: results are those of one pass
after the other, bit for bit. Here: taking turns. Not
here: what is collected at a block (`moments`, `gradients`), where its weights come from
(`offload`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch


class _Abandoned(BaseException):
    """Unwinds a pass that is not to go on; no `except Exception` of a model stops it."""


class _Pass:
    """One forward pass in its thread."""

    def __init__(self, work: Callable[[], None], turns: Turns) -> None:
        self._work = work
        self._turns = turns
        self._threads = torch.get_num_threads()
        self._go = threading.Semaphore(0)
        self.done = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="realign-pass", daemon=True)

    def resume(self) -> None:
        """Run until the next stop or the end; returns when that is reached."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self._go.release()
        self._turns.back.acquire()

    def release(self) -> None:
        """Wake it at its stop, without waiting for it."""
        self._go.release()

    def stop(self) -> None:
        """Called in the pass's own thread, at the entrance of a block."""
        self._turns.back.release()
        self._go.acquire()
        if self._turns.abandoned:
            raise _Abandoned

    def _run(self) -> None:
        try:
            torch.set_num_threads(self._threads)  # which some libraries keep for each thread
            self._work()
        except _Abandoned:
            pass
        except BaseException as error:  # handed to the caller, who raises it in his own thread
            self.error = error
        finally:
            self.done = True
            self._turns.back.release()


class Turns:
    """Whose turn it is."""

    def __init__(self) -> None:
        self.back = threading.Semaphore(0)
        self.abandoned = False
        self.current: _Pass | None = None


def run_in_lockstep(
    passes: Sequence[Callable[[], None]],
    *,
    blocks: Sequence[Any],
    resumed: Callable[[int], None] = lambda _: None,
    stage_done: Callable[[], None] = lambda: None,
) -> None:
    """Run every pass to its end, all of them through one block before any enters the next.

    Args:
        passes: each a forward pass; what is thread-local, as `torch.no_grad`, belongs inside.
        blocks: the modules at whose entrance a pass stops.
        resumed: called with a pass's number in the thread that is about to go on with it.
        stage_done: called when all passes stand at the next entrance or have ended.

    Raises:
        Whatever a pass raises, after all others have been unwound. So does an interruption.
    """
    turns = Turns()
    tasks = [_Pass(work, turns) for work in passes]

    def entrance(module: Any, args: Any) -> None:
        if turns.current is not None:
            turns.current.stop()

    handles = [block.register_forward_pre_hook(entrance, prepend=True) for block in blocks]
    try:
        while not all(task.done for task in tasks):
            for number, task in enumerate(tasks):
                if task.done:
                    continue
                turns.current = task
                resumed(number)
                task.resume()
                if task.error is not None:
                    raise task.error
            stage_done()
    finally:
        turns.abandoned = True
        _unwind(tasks)
        turns.current = None
        for handle in handles:
            handle.remove()


def _unwind(tasks: Sequence[_Pass]) -> None:
    """Let every pass that has begun come to its end: at its stop, or at the next one."""
    for task in tasks:
        while task.thread.is_alive():
            task.release()
            task.thread.join(timeout=0.05)


def decoder_blocks(body: Any) -> list[Any]:
    """The modules that a model runs one after the other: members of its outermost module lists."""
    found: list[Any] = []

    def look(module: Any) -> None:
        for child in module.children():
            if isinstance(child, torch.nn.ModuleList):
                found.extend(child)
            else:
                look(child)

    look(body)
    return found
