"""Taking matrices to an accelerator and back: pinned buffers, streams of their own, retries.

Every working thread has a lane: a stream on which it uploads, computes and downloads, and two
pinned buffers through which its transfers go in chunks, so that the copy into one overlaps the
transfer out of the other. Lanes do not wait for each other: while one computes, another uploads.
On the CPU a lane passes its tensors through.

Here: transfers and sharing the device's memory. Not here: what is computed, how many lanes there
are (`engine`).

The chunked copy knows only a `Port`, which starts a copy and says when it is over; so its logic is
tested where there is no accelerator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import Tensor

BUFFER_BYTES = 16 * 2**20
"""Size of one staging buffer: large enough for the full rate of a transfer."""

T = TypeVar("T")


class Pending(Protocol):
    """A copy that was started."""

    def synchronize(self) -> None:
        """Wait until it is over."""
        ...


class Port(Protocol):
    """Where chunks are copied to and from."""

    def buffer(self, nbytes: int) -> Tensor:
        """Host memory [nbytes] of bytes from which and to which the device copies by itself."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the device."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> Pending:
        """Start a copy between host and device; copies of one port are carried out in order."""
        ...


class CudaPort:
    """Copies on the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def buffer(self, nbytes: int) -> Tensor:
        """See `Port.buffer`."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """See `Port.empty`."""
        return torch.empty(shape, dtype=dtype, device=self._device)

    def copy(self, source: Tensor, target: Tensor) -> Pending:
        """See `Port.copy`."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event


class Staging:
    """Copies through two buffers in turn: one is filled while the other one is under way."""

    def __init__(self, port: Port, *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._port, self._size = port, buffer_bytes
        self._buffers: list[Tensor] = []
        self._pending: list[Pending | None] = [None, None]
        self._turn = 0

    def up(self, host: Tensor) -> Tensor:
        """A copy of `host` on the device; may still be under way on the port's stream."""
        if host.dim() == 2 and not host.is_contiguous() and host.T.is_contiguous():
            return self.up(host.T).T  # the layout of the file: turned over on the device
        host = host.contiguous()
        device = self._port.empty(tuple(host.shape), host.dtype)
        source, target = _as_bytes(host), _as_bytes(device)
        for start in range(0, source.numel(), self._size):
            part = source[start : start + self._size]
            buffer = self._next(part.numel())
            buffer.copy_(part)
            self._started(self._port.copy(buffer, target[start : start + part.numel()]))
        return device

    def down(self, device: Tensor, host: Tensor) -> None:
        """Copy `device` into `host`, of the same shape and type; over when this returns."""
        if host.dim() == 2 and not host.is_contiguous() and host.T.is_contiguous():
            return self.down(device.T, host.T)
        if not host.is_contiguous():
            whole = torch.empty(host.shape, dtype=host.dtype)
            self.down(device, whole)
            host.copy_(whole)
            return None
        source, target = _as_bytes(device.contiguous()), _as_bytes(host)
        behind: Callable[[], None] | None = None
        for start in range(0, source.numel(), self._size):
            part = source[start : start + self._size]
            buffer, turn = self._next(part.numel()), self._turn
            self._started(self._port.copy(part, buffer))

            def finish(start: int = start, turn: int = turn, buffer: Tensor = buffer) -> None:
                self._finish(turn)
                target[start : start + buffer.numel()].copy_(buffer)

            if behind is not None:
                behind()
            behind = finish
        if behind is not None:
            behind()
        return None

    def _next(self, nbytes: int) -> Tensor:
        if not self._buffers:
            self._buffers = [self._port.buffer(self._size) for _ in range(2)]
        self._turn = 1 - self._turn
        self._finish(self._turn)
        return self._buffers[self._turn][:nbytes]

    def _started(self, pending: Pending) -> None:
        self._pending[self._turn] = pending

    def _finish(self, turn: int) -> None:
        pending, self._pending[turn] = self._pending[turn], None
        if pending is not None:
            pending.synchronize()


class Lane:
    """The transfers of one thread."""

    def __init__(self, staging: Staging | None) -> None:
        self._staging = staging

    def up(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on the device of the lane."""
        if self._staging is None:
            return dict(views)
        return {label: self._staging.up(view) for label, view in views.items()}

    def down(self, result: Tensor, target: Tensor) -> None:
        """Put a result into a view of host memory, of the same shape and type."""
        if self._staging is None:
            target.copy_(result)
        else:
            self._staging.down(result, target)


class Lanes:
    """The lanes of all threads onto one device, and the memory that they share."""

    def __init__(self, device: torch.device, *, port: Port | None = None) -> None:
        """Open no lane yet.

        Args:
            device: where matrices are computed.
            port: how they get there; by default over CUDA where the device is one.
        """
        self._device = device
        self._port = port if port is not None or device.type != "cuda" else CudaPort(device)
        self._own = threading.local()
        self._state = threading.Condition()
        self._inside = 0
        self._alone = False

    def run(self, work: Callable[[Lane], T]) -> T:
        """Do `work` in the lane of the calling thread.

        Where the device's memory is too small beside the other lanes, it is done again when they
        are empty.

        Raises:
            torch.OutOfMemoryError: the memory is too small for this work alone.
        """
        try:
            with self._entered(alone=False), self._stream():
                return work(self._lane())
        except torch.OutOfMemoryError:
            pass  # what the failed attempt held is freed when its traceback is
        with self._entered(alone=True), self._stream():
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return work(self._lane())

    def _lane(self) -> Lane:
        if not hasattr(self._own, "lane"):
            if self._port is not None:
                self._own.lane = Lane(Staging(self._port))
            elif self._device.type == "cpu":
                self._own.lane = Lane(None)
            else:
                self._own.lane = Lane(Staging(_PlainPort(self._device)))
        return self._own.lane

    def _stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return nullcontext()
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._own.stream)

    @contextmanager
    def _entered(self, *, alone: bool) -> Generator[None]:
        """Several at once, or one that has the device for itself."""
        with self._state:
            self._state.wait_for(lambda: not self._alone and not (alone and self._inside))
            self._inside += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._state:
                self._inside -= 1
                self._alone = False
                self._state.notify_all()


class _PlainPort:
    """Copies that are over at once, for accelerators without streams of ours (Apple's)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def copy(self, source: Tensor, target: Tensor) -> Pending:
        target.copy_(source)
        return _OVER


class _Over:
    def synchronize(self) -> None:
        """Nothing is under way."""


_OVER = _Over()


def device_memory(device: torch.device) -> int | None:
    """Bytes that are free on an accelerator; None where nobody can tell."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
