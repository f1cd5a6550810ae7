"""Read, work, write: three stages in threads, results in order, memory bounded by a budget.

Every job has a cost in bytes, known before anything is read: what it will hold at its worst. A job
is read as soon as its cost fits beside those under way, and its cost is given back when its result
has been written; one job alone is always admitted. Results come in the order of the jobs, whatever
the number of threads, so nothing that is written depends on it.

    reading thread      jobs -> read                    waits for the budget
    working threads     read -> worked                  none: the caller's thread works
    the caller          iterates over results, hands them on
    writing thread      consumes what was handed on     gives the budget back

The first error of any thread ends all of them and is raised in the caller's; no thread reads or
writes after the context is left, be it by Ctrl-C, once or again and again. Not here: what is read,
computed or written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

J = TypeVar("J")
T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W")

_PATIENCE = 2.0
"""Seconds that a failed run waits for a decomposition under way; it touches no file."""


class _Stopped(BaseException):
    """Ends a thread of a pipeline that is over; never leaves this module."""


@dataclass(eq=False)
class _Entry:
    """One job under way."""

    cost: int
    value: Any = None
    done: bool = False


class Pipeline(Generic[J, T, R, W]):
    """A context manager; iterate over it for the results, `hand` on what is to be written."""

    def __init__(
        self,
        jobs: Iterable[J],
        *,
        read: Callable[[J], T],
        work: Callable[[T], R],
        cost: Callable[[J], int],
        budget: int,
        workers: int = 0,
        write: Callable[[Iterator[W]], None] | None = None,
    ) -> None:
        """Describe the stages; nothing starts before the context is entered.

        Args:
            jobs: in order; taken in the reading thread.
            read: fetches what a job needs.
            work: turns that into a result; called from several threads where `workers` > 1.
            cost: bytes that a job holds at its worst, from admission until it is written.
            budget: bytes that all jobs under way may cost together.
            workers: threads that work; 0: the caller's.
            write: consumes everything that is handed on, in a thread of its own.
        """
        self._jobs, self._read, self._work, self._cost = jobs, read, work, cost
        self._budget, self._workers, self._write = budget, workers, write
        self._state = threading.Condition()
        self._used = 0
        self._entries: deque[_Entry] = deque()  # in order; read, perhaps worked
        self._todo: deque[tuple[_Entry, T]] = deque()  # for the working threads
        self._out: deque[tuple[W, int]] = deque()  # handed on, with what each gives back
        self._current = 0  # the cost of the result in the caller's hands
        self._all_read = self._all_handed = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._files: set[str] = set()  # threads under way that read or write
        self._idle: set[str] = set()  # threads under way that only compute

    def __enter__(self) -> Self:
        """Start the threads."""
        try:
            self._start(self._reading, "realign-read", self._files)
            for number in range(self._workers):
                self._start(self._working, f"realign-work-{number}", self._idle)
            if self._write is not None:
                self._start(self._writing, "realign-write", self._files)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _start(self, stage: Callable[[], None], name: str, group: set[str]) -> None:
        def run() -> None:
            try:
                stage()
            except _Stopped:
                pass
            except BaseException as error:  # raised again in the caller's thread
                self._fail(error)
            finally:
                with self._state:
                    group.discard(name)
                    self._state.notify_all()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        group.add(name)
        try:
            thread.start()
        except RuntimeError:  # the system has no thread left
            group.discard(name)
            raise

    def __iter__(self) -> Iterator[R]:
        """The results, in the order of the jobs."""
        while True:
            with self._state:
                self._give_back(self._current)
                self._current = 0
                self._wait(lambda: self._ready() or (self._all_read and not self._entries))
                if not self._entries:
                    return
                entry = self._entries.popleft()
                self._current = entry.cost
                value, entry.value = entry.value, None
            if not self._workers:
                value = self._work(value)
            yield value
            del value, entry  # nothing is held while the next one is awaited

    def hand(self, value: W) -> None:
        """Give something to the writing thread: the whole result, or what became of it."""
        with self._state:
            self._check()
            self._out.append((value, self._current))
            self._current = 0
            self._state.notify_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait until everything is written; after an error, until nobody reads or writes."""
        interrupt: BaseException | None = None
        while True:
            try:
                if error is not None:
                    self._fail(_Stopped())
                self._await_end()
                break
            except BaseException as late:  # Ctrl-C: the threads still have to end first
                error = late
                interrupt = interrupt or late
        if interrupt is not None:
            raise interrupt
        if self._error is not None and not isinstance(self._error, _Stopped):
            raise self._error

    def _await_end(self) -> None:
        """Not by `Thread.join`: one that Ctrl-C interrupts takes the thread for ended (3.11)."""
        with self._state:
            self._all_handed = True
            self._state.notify_all()
            self._state.wait_for(lambda: self._error is not None or not self._files | self._idle)
            self._state.wait_for(lambda: not self._files)
            self._state.wait_for(lambda: not self._idle, _PATIENCE)
            left = set(self._idle)
        for thread in self._threads:
            if thread.name not in left and thread.ident is not None:
                thread.join()  # its stage is over

    def _reading(self) -> None:
        for job in self._jobs:
            entry = _Entry(self._cost(job))
            with self._state:
                self._wait(lambda cost=entry.cost: not self._used or self._fits(cost))
                self._used += entry.cost
            value = self._read(job)
            with self._state:
                self._check()
                self._entries.append(entry)
                if self._workers:
                    self._todo.append((entry, value))
                else:
                    entry.value, entry.done = value, True
                self._state.notify_all()
            del job, value, entry
        with self._state:
            self._all_read = True
            self._state.notify_all()

    def _working(self) -> None:
        while True:
            with self._state:
                self._wait(lambda: bool(self._todo) or self._all_read)
                if not self._todo:
                    return
                entry, value = self._todo.popleft()
            result = self._work(value)
            with self._state:
                self._check()
                entry.value, entry.done = result, True
                self._state.notify_all()
            del entry, value, result

    def _writing(self) -> None:
        assert self._write is not None
        self._write(self._handed())

    def _handed(self) -> Iterator[W]:
        cost = 0
        while True:
            with self._state:
                self._give_back(cost)
                self._wait(lambda: bool(self._out) or self._all_handed)
                if not self._out:
                    return
                value, cost = self._out.popleft()
            yield value
            del value

    def _fits(self, cost: int) -> bool:
        return self._used + cost <= self._budget

    def _ready(self) -> bool:
        return bool(self._entries) and self._entries[0].done

    def _give_back(self, cost: int) -> None:
        if cost:
            self._used -= cost
            self._state.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait, holding the lock; leave at once when the pipeline has failed."""
        self._state.wait_for(lambda: self._error is not None or condition())
        self._check()

    def _check(self) -> None:
        if self._error is None:
            return
        if threading.current_thread() in self._threads or isinstance(self._error, _Stopped):
            raise _Stopped
        raise self._error

    def _fail(self, error: BaseException) -> None:
        with self._state:
            if self._error is None:
                self._error = error
            self._entries.clear()
            self._todo.clear()
            self._out.clear()
            self._state.notify_all()
