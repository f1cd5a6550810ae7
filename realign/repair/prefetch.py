"""One step ahead: an iterator whose next item is made in a thread while this one is used.

Never more than one item is waiting or being made, so memory stays bounded by two items.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterate over `source` one item ahead; use as a context manager, so that the thread ends.

    An exception of the source is raised where its item would have come.
    """

    def __init__(self, source: Iterable[T]) -> None:
        self._source = source
        self._lock = threading.Condition()
        self._item: list[T] = []
        self._error: BaseException | None = None
        self._done = False
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="realign-prefetch", daemon=True)

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopped = True
            self._item.clear()
            self._lock.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._item or self._done)
                if self._item:
                    item = self._item.pop()
                    self._lock.notify_all()
                elif self._error is not None:
                    raise self._error
                else:
                    return
            yield item
            del item  # the consumer's reference is the last one: nothing is held while we wait

    def _work(self) -> None:
        iterator = iter(self._source)
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(lambda: not self._item or self._stopped)
                    if self._stopped:
                        return
                item = next(iterator, _END)
                if isinstance(item, _End):
                    return
                with self._lock:
                    if self._stopped:
                        return
                    self._item.append(item)
                    self._lock.notify_all()
                del item
        except BaseException as error:  # handed to the consumer, Ctrl-C included
            self._error = error
        finally:
            with self._lock:
                self._done = True
                self._lock.notify_all()


class _End:
    """No item."""


_END = _End()
