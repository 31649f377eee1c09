"""A GPU as the runner sees it: work is queued in one order, and the host awaits what it has copied back, nothing else.

`Cuda` is the GPU. The tests have another one, which records what is queued and spoils what is read or reused too
early. Which one it is, is chosen once (load.py); no code but this asks what kind of device there is.

Computation itself is torch's and Triton's, in the same order: both use the current stream.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np


class Mark(Protocol):
    """A place in the queue."""

    def wait(self) -> None:
        """Until the device has come to it."""
        ...


class Graph(Protocol):
    """Computation that was captured, to be queued as one."""

    def replay(self) -> torch.Tensor:
        """Queue it again, on the inputs that it was captured with, and return its output: good until the next replay.

        Of any graph: they share their memory.
        """
        ...


class Accelerator(Protocol):
    """The device."""

    @property
    def device(self) -> torch.device:
        """As torch calls it."""
        ...

    def pinned(self, size: int) -> torch.Tensor:
        """Host memory that the device can copy from by itself: int64 [size], nobody else's until the copy is done."""
        ...

    def upload(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of what `pinned` gave, which is not to be written any more."""
        ...

    def download(self, source: torch.Tensor) -> torch.Tensor:
        """Queue a copy to the host; it is there once a later mark has been awaited."""
        ...

    def mark(self) -> Mark:
        """Mark the present end of the queue."""
        ...

    def capture(self, compute: Callable[[], torch.Tensor]) -> Graph:
        """Capture what `compute` queues, after it was computed once. Larger graphs first: they share their memory."""
        ...

    def free_bytes(self) -> int:
        """Memory of the device that nobody has, once all that is queued is done."""
        ...

    def peak_bytes(self, compute: Callable[[], object]) -> int:
        """Compute something, and return how much more memory there was taken meanwhile than before."""
        ...


class Cuda:
    """An NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # of the graphs' memory

    def pinned(self, size: int) -> torch.Tensor:
        """See Accelerator; torch gives the memory out again when the copy is done, not before."""
        return torch.empty(size, dtype=torch.int64, pin_memory=True)

    def upload(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """See Accelerator."""
        destination.copy_(source, non_blocking=True)

    def download(self, source: torch.Tensor) -> torch.Tensor:
        """See Accelerator."""
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        return host.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """See Accelerator."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch
        event.record()
        return _Event(event)

    def capture(self, compute: Callable[[], torch.Tensor]) -> Graph:
        """See Accelerator."""
        compute()  # kernels are built and libraries begun, which cannot be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = compute()
        self._pool = graph.pool()
        return _Captured(graph, output)

    def free_bytes(self) -> int:
        """See Accelerator."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def peak_bytes(self, compute: Callable[[], object]) -> int:
        """See Accelerator."""
        before = self.free_bytes()
        compute()
        torch.cuda.synchronize(self.device)
        # torch keeps what it has taken until it is asked to give it back: what is missing is the peak.
        missing = before - int(torch.cuda.mem_get_info(self.device)[0])
        return max(0, missing)


class _Event:
    """See Mark."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """See Mark."""
        self._event.synchronize()


class _Captured:
    """See Graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph, self._output = graph, output

    def replay(self) -> torch.Tensor:
        """See Graph."""
        self._graph.replay()
        return self._output


def send(accelerator: Accelerator, pieces: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Copy arrays to the device in one copy: int64 of the same shapes, each from a multiple of 16 bytes on."""
    sizes = [piece.size + piece.size % 2 for piece in pieces]
    staged = accelerator.pinned(sum(sizes))
    array = staged.numpy()
    sent = torch.empty(sum(sizes), dtype=torch.int64, device=accelerator.device)
    end = 0
    for piece, size in zip(pieces, sizes, strict=True):
        array[end : end + piece.size] = piece.ravel()
        end += size
    accelerator.upload(sent, staged)
    parts = torch.split(sent, sizes)
    return [part[: math.prod(piece.shape)].view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
