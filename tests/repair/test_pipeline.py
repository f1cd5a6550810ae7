from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.repair.pipeline import Pipeline


def _run(costs: list[int], *, workers: int, budget: int, write: bool = True) -> list[int]:
    written: list[int] = []

    def consume(values: Iterator[int]) -> None:
        written.extend(values)

    results: list[int] = []
    with Pipeline(
        range(len(costs)),
        read=lambda job: job * 10,
        work=lambda value: value + 1,
        cost=lambda job: costs[job],
        budget=budget,
        workers=workers,
        write=consume if write else None,
    ) as pipeline:
        for result in pipeline:
            results.append(result)
            if write:
                pipeline.hand(result)
    if write:
        assert written == results
    return results


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.integers(0, 10), max_size=20),
    workers=st.integers(0, 3),
    budget=st.integers(1, 12),
    write=st.booleans(),
)
def test_every_result_in_order(costs: list[int], workers: int, budget: int, write: bool) -> None:
    found = _run(costs, workers=workers, budget=budget, write=write)
    assert found == [job * 10 + 1 for job in range(len(costs))]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_never_more_under_way_than_the_budget_but_one_alone(workers: int) -> None:
    costs = [3, 4, 3, 20, 1, 1, 1, 5, 5, 9]
    lock, under_way, most = threading.Lock(), {}, []

    def read(job: int) -> int:
        with lock:
            under_way[job] = costs[job]
            most.append((len(under_way), sum(under_way.values())))
        return job

    def write(values: Iterator[int]) -> None:
        for job in values:
            time.sleep(0.002)
            with lock:
                del under_way[job]

    with Pipeline(
        range(len(costs)),
        read=read,
        work=lambda job: job,
        cost=lambda job: costs[job],
        budget=10,
        workers=workers,
        write=write,
    ) as pipeline:
        for job in pipeline:
            pipeline.hand(job)
    assert not under_way
    assert all(total <= 10 or count == 1 for count, total in most)
    assert max(count for count, _ in most) > 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["jobs", "read", "work", "write", "caller"])
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

    def write(values: Iterator[int]) -> None:
        for job in values:
            written.append(fail("write", job))

    with (
        pytest.raises(error, match="here"),
        Pipeline(
            jobs(),
            read=lambda job: fail("read", job),
            work=lambda job: fail("work", job),
            cost=lambda _: 1,
            budget=4,
            workers=workers,
            write=write,
        ) as pipeline,
    ):
        for job in pipeline:
            fail("caller", job)
            pipeline.hand(job)
    assert threading.active_count() == before
    assert written == list(range(len(written))) and len(written) <= 5
    count = len(written)
    time.sleep(0.01)
    assert len(written) == count


def test_several_are_worked_on_at_once() -> None:
    meet = threading.Barrier(2, timeout=10)

    def work(job: int) -> int:
        meet.wait()  # passes only where two threads are inside
        return job

    with Pipeline(
        range(6), read=lambda job: job, work=work, cost=lambda _: 1, budget=4, workers=2
    ) as pipeline:
        assert list(pipeline) == list(range(6))


@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_while_the_writer_is_awaited(times: int) -> None:
    """All is handed on and the caller waits: it goes when the write under way is over, not before.

    However often Ctrl-C is pressed meanwhile.
    """
    before = threading.active_count()
    main = threading.main_thread().ident
    assert main is not None
    leaving = threading.Event()
    written: list[int] = []

    def write(values: Iterator[int]) -> None:
        for job in values:
            leaving.wait()
            if not written:
                for _ in range(times):
                    time.sleep(0.05)
                    signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.05)
            written.append(job)

    with (
        pytest.raises(KeyboardInterrupt),
        Pipeline(
            range(8),
            read=lambda job: job,
            work=lambda job: job,
            cost=lambda _: 1,
            budget=100,
            write=write,
        ) as pipeline,
    ):
        for job in pipeline:
            pipeline.hand(job)
        leaving.set()
    assert written == [0]
    assert threading.active_count() == before
    time.sleep(0.1)
    assert written == [0]
