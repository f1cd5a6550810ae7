"""Read, work, write: in a few threads, results in order, memory bounded by a budget.

Every job has a cost in bytes, known before anything is read: what it will hold at its worst. A job
is read as soon as its cost fits beside those under way, and its cost is given back when its result
has been written; one job alone is always admitted. Results are written in the order of the jobs,
whatever the number of threads, so nothing that is written depends on it.

All threads are alike. Each takes the next job, reads it, works on it and lays the result down; if
that was the one that is due, and nobody else is writing, it writes all that can be written now.
Reading and writing are done by one thread at a time, in order. So whoever read a job works on it
while it is in the processor's cache, and there are no more threads than processors: with a thread
for each stage, handing over and waiting for the interpreter's lock cost as much as all the work.

The first error of any thread ends all of them and is raised in the caller's; no thread reads or
writes after `run` is left, be it by Ctrl-C, once or again and again. Not here: what is read,
computed or written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

J = TypeVar("J")
T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 2.0
"""Seconds that a failed run waits for a decomposition under way; it touches no file."""


class _Stopped(BaseException):
    """Ends a thread of a pipeline that is over; never leaves this module."""


@dataclass(eq=False)
class _Entry:
    """One job under way."""

    cost: int
    result: Any = None
    done: bool = False


class Pipeline(Generic[J, T, R]):
    """Carries every job through its stages, once."""

    def __init__(
        self,
        jobs: Iterable[J],
        *,
        read: Callable[[J], T],
        work: Callable[[T], R],
        write: Callable[[R], None],
        cost: Callable[[J], int],
        budget: int,
        workers: int = 1,
    ) -> None:
        """Describe the stages; nothing starts before `run`.

        Args:
            jobs: in order; taken by one thread at a time.
            read: fetches what a job needs; called for one job at a time, in order.
            work: turns that into a result; called from several threads where `workers` > 1.
            write: takes the results, one at a time, in order.
            cost: bytes that a job holds at its worst, from admission until it is written.
            budget: bytes that all jobs under way may cost together.
            workers: how many threads, at least one.
        """
        self._jobs, self._cost, self._budget, self._workers = iter(jobs), cost, budget, workers
        self._read, self._work, self._write = read, work, write
        # One lock; the threads wait for room and for their turn, the caller for their end.
        self._state = threading.Lock()
        self._for_threads = threading.Condition(self._state)
        self._for_caller = threading.Condition(self._state)
        self._used = 0
        self._entries: deque[_Entry] = deque()  # in order, from admission until written
        self._reading = self._all_read = self._writing = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._alive: set[str] = set()
        self._files: set[str] = set()  # those of them that read or write just now

    def run(self) -> None:
        """Return when everything is written; after an error, when nobody reads or writes any more.

        Raises:
            Whatever a stage raised first.
        """
        interrupt: BaseException | None = None
        try:
            for number in range(self._workers):
                self._start(f"realign-work-{number}")
        except BaseException as error:  # no thread is left, or Ctrl-C
            interrupt = error
        while True:
            try:
                if interrupt is not None:
                    self._fail(interrupt)
                self._await_end()
                break
            except BaseException as late:  # Ctrl-C: the threads still have to end first
                interrupt = interrupt or late
        if interrupt is not None:
            raise interrupt
        if self._error is not None:
            raise self._error

    def _start(self, name: str) -> None:
        thread = threading.Thread(target=self._thread, name=name, daemon=True)
        self._threads.append(thread)
        self._alive.add(name)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            self._alive.discard(name)
            raise

    def _await_end(self) -> None:
        """Not by `Thread.join`: one that Ctrl-C interrupts takes the thread for ended (3.11)."""
        with self._state:
            self._for_caller.wait_for(lambda: self._error is not None or not self._alive)
            self._for_caller.wait_for(lambda: not self._files)
            self._for_caller.wait_for(lambda: not self._alive, _PATIENCE)
            left = set(self._alive)
        for thread in self._threads:
            if thread.name not in left and thread.ident is not None:
                thread.join()  # it is past its last job

    def _thread(self) -> None:
        name = threading.current_thread().name
        try:
            while (found := self._next(name)) is not None:
                entry, value = found
                del found
                result = self._work(value)
                del value
                self._lay_down(entry, result)
                del entry, result  # nothing is held while the next one is awaited
                self._write_due(name)
        except _Stopped:
            pass
        except BaseException as error:  # raised again in the caller's thread
            self._fail(error)
        finally:
            with self._state:
                self._alive.discard(name)
                self._files.discard(name)
                self._for_caller.notify()

    def _next(self, name: str) -> tuple[_Entry, T] | None:
        """The next job, read as soon as there is room for it; None: there is none left."""
        with self._state:
            self._wait(lambda: not self._reading)
            if self._all_read:
                return None
            self._reading = True
            self._files.add(name)
        try:
            for job in self._jobs:
                return self._admit(self._cost(job)), self._read(job)
            self._all_read = True
            return None
        finally:
            with self._state:
                self._reading = False
                self._for_threads.notify_all()
                self._leave_files(name)

    def _admit(self, cost: int) -> _Entry:
        entry = _Entry(cost)
        with self._state:
            self._wait(partial(self._fits, cost))
            self._used += cost
            self._entries.append(entry)
        return entry

    def _fits(self, cost: int) -> bool:
        return not self._used or self._used + cost <= self._budget

    def _lay_down(self, entry: _Entry, result: R) -> None:
        with self._state:
            self._check()
            entry.result, entry.done = result, True

    def _write_due(self, name: str) -> None:
        """Write what is due and there, unless another thread is at it: then that one will."""
        with self._state:
            if self._writing:
                return
            self._writing = True
            self._files.add(name)
        while (entry := self._due(name)) is not None:
            result, entry.result = entry.result, None
            self._write(result)
            del result
            with self._state:
                self._used -= entry.cost
                self._for_threads.notify_all()

    def _due(self, name: str) -> _Entry | None:
        """The next result to write, if it is there; otherwise this thread writes no longer."""
        with self._state:
            self._check()
            if self._entries and self._entries[0].done:
                return self._entries.popleft()
            # Under the same lock: what is laid down from here on finds nobody writing.
            self._writing = False
            self._leave_files(name)
            return None

    def _leave_files(self, name: str) -> None:
        self._files.discard(name)
        if self._error is not None:
            self._for_caller.notify()

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait, holding the lock; leave at once when the pipeline has failed."""
        self._for_threads.wait_for(lambda: self._error is not None or condition())
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise _Stopped

    def _fail(self, error: BaseException) -> None:
        with self._state:
            if self._error is None:
                self._error = error
            self._entries.clear()
            self._for_threads.notify_all()
            self._for_caller.notify()
