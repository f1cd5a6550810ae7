from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.repair.prefetch import Prefetch


@given(items=st.lists(st.integers(), max_size=30))
def test_every_item_in_order(items: list[int]) -> None:
    with Prefetch(items) as prefetch:
        assert list(prefetch) == items


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("unreadable")

    seen: list[int] = []
    with pytest.raises(OSError, match="unreadable"), Prefetch(source()) as prefetch:
        for item in prefetch:
            seen.append(item)
    assert seen == [1, 2]


def test_never_more_than_one_item_ahead() -> None:
    made = 0
    ready = threading.Event()

    def source() -> Iterator[int]:
        nonlocal made
        for item in range(10):
            made += 1
            ready.set()
            yield item

    with Prefetch(source()) as prefetch:
        for item in prefetch:
            ready.wait(1.0)
            assert item + 1 <= made <= item + 2


def test_leaving_early_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    before = threading.active_count()
    with Prefetch(endless()) as prefetch:
        next(iter(prefetch))
    with pytest.raises(KeyboardInterrupt), Prefetch(endless()) as prefetch:
        for _ in prefetch:
            raise KeyboardInterrupt
    assert threading.active_count() == before
