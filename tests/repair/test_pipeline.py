from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.repair.pipeline import Pipeline


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(0, 10), max_size=20),
    workers=st.integers(1, 4),
    budget=st.integers(1, 12),
    slow=st.sets(st.integers(0, 20)),
)
def test_every_result_is_written_once_and_in_order(
    costs: list[int], workers: int, budget: int, slow: set[int]
) -> None:
    read: list[int] = []
    written: list[int] = []

    def fetch(job: int) -> int:
        read.append(job)
        return job * 10

    def work(value: int) -> int:
        if value // 10 in slow:
            time.sleep(0.001)
        return value + 1

    Pipeline(
        range(len(costs)),
        read=fetch,
        work=work,
        write=written.append,
        cost=lambda job: costs[job],
        budget=budget,
        workers=workers,
    ).run()
    assert read == list(range(len(costs)))
    assert written == [job * 10 + 1 for job in range(len(costs))]


@pytest.mark.parametrize("workers", [2, 3])
def test_never_more_under_way_than_the_budget_but_one_alone(workers: int) -> None:
    costs = [3, 4, 3, 20, 1, 1, 1, 5, 5, 9]
    lock, under_way, most = threading.Lock(), {}, []

    def read(job: int) -> int:
        with lock:
            under_way[job] = costs[job]
            most.append((len(under_way), sum(under_way.values())))
        return job

    def write(job: int) -> None:
        time.sleep(0.002)
        with lock:
            del under_way[job]

    Pipeline(
        range(len(costs)),
        read=read,
        work=lambda job: job,
        write=write,
        cost=lambda job: costs[job],
        budget=10,
        workers=workers,
    ).run()
    assert not under_way
    assert all(total <= 10 or count == 1 for count, total in most)
    assert max(count for count, _ in most) > 1


@pytest.mark.parametrize("workers", [1, 3])
def test_one_thread_at_a_time_reads_and_one_writes(workers: int) -> None:
    inside = {"read": 0, "write": 0}
    most = dict(inside)
    lock = threading.Lock()

    def stage(name: str, job: int) -> int:
        with lock:
            inside[name] += 1
            most[name] = max(most[name], inside[name])
        time.sleep(0.0005)
        with lock:
            inside[name] -= 1
        return job

    Pipeline(
        range(100),
        read=lambda job: stage("read", job),
        work=lambda job: job,
        write=lambda job: void(stage("write", job)),
        cost=lambda _: 1,
        budget=8,
        workers=workers,
    ).run()
    assert most == {"read": 1, "write": 1}


def void(_: object) -> None:
    """Nothing comes of it."""


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("stage", ["jobs", "cost", "read", "work", "write"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_first_error_ends_all_threads(
    workers: int, stage: str, error: type[BaseException]
) -> None:
    before = threading.active_count()
    written: list[int] = []

    def jobs() -> Iterator[int]:
        for job in range(1000):
            if stage == "jobs" and job == 5:
                raise error("here")
            yield job

    def fail(name: str, job: int) -> int:
        if stage == name and job == 5:
            raise error("here")
        return job

    pipeline = Pipeline(
        jobs(),
        read=lambda job: fail("read", job),
        work=lambda job: fail("work", job),
        write=lambda job: written.append(fail("write", job)),
        cost=lambda job: 1 + 0 * fail("cost", job),
        budget=4,
        workers=workers,
    )
    with pytest.raises(error, match="here"):
        pipeline.run()
    assert threading.active_count() == before
    assert written == list(range(len(written))) and len(written) <= 5
    count = len(written)
    time.sleep(0.01)
    assert len(written) == count


def test_several_are_worked_on_at_once() -> None:
    meet = threading.Barrier(2, timeout=10)
    written: list[int] = []

    def work(job: int) -> int:
        meet.wait()  # passes only where two threads are inside
        return job

    Pipeline(
        range(6),
        read=lambda job: job,
        work=work,
        write=written.append,
        cost=lambda _: 1,
        budget=4,
        workers=2,
    ).run()
    assert written == list(range(6))


def test_others_go_on_while_the_result_that_is_due_takes_its_time() -> None:
    """The first job ends last; what was done meanwhile is written right after it."""
    rest = threading.Event()
    seen: list[int] = []
    written: list[int] = []

    def work(job: int) -> int:
        if job == 0:
            assert rest.wait(10)
        seen.append(job)
        if len(seen) == 4:
            rest.set()
        return job

    Pipeline(
        range(6),
        read=lambda job: job,
        work=work,
        write=written.append,
        cost=lambda _: 1,
        budget=5,
        workers=2,
    ).run()
    assert seen[:4] == [1, 2, 3, 4] and written == list(range(6))


@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_while_a_thread_writes(times: int) -> None:
    """The caller goes when the write under way is over, not before, and nothing follows it.

    However often Ctrl-C is pressed meanwhile.
    """
    before = threading.active_count()
    main = threading.main_thread().ident
    assert main is not None
    written: list[int] = []

    def write(job: int) -> None:
        if not written:
            for _ in range(times):
                time.sleep(0.05)
                signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)
        written.append(job)

    _stop(Pipeline, write)
    assert written == [0]
    assert threading.active_count() == before
    time.sleep(0.1)
    assert written == [0]


def _stop(kind: type[Pipeline[int, int, int]], write: Callable[[int], None]) -> None:
    """Run a pipeline that only Ctrl-C ends before its last job."""
    pipeline = kind(
        range(100),
        read=lambda job: job,
        work=lambda job: job,
        write=write,
        cost=lambda _: 1,
        budget=100,
        workers=3,
    )
    with pytest.raises(KeyboardInterrupt):
        pipeline.run()


class Interrupted(Pipeline[int, int, int]):
    """Ctrl-C after the first of its threads has started."""

    def _start(self, name: str) -> None:
        super()._start(name)
        raise KeyboardInterrupt


def test_ctrl_c_while_the_threads_are_started() -> None:
    before = threading.active_count()
    written: list[int] = []

    def write(job: int) -> None:
        time.sleep(0.02)
        written.append(job)

    _stop(Interrupted, write)
    count = len(written)
    assert count <= 1
    assert threading.active_count() == before
    time.sleep(0.1)
    assert len(written) == count
