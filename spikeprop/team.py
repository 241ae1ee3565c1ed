"""Several processes that train one network: what they say to each other, and what they say when one is lost.

Two ways to share the work, see :mod:`spikeprop.parallel`. Rows: every process has the whole network and some rows of each
batch, and a :class:`Share` turns what it found on its rows into what all found on all rows. Layers: every process has some
layers, and a :class:`Pipe` takes spikes to the process that has the layers above. Both speak through torch.distributed, whose
default group the caller has set up (:func:`spikeprop.parallel.start`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spikeprop.errors import ProcessError

DTYPES = (torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool)
IN_FLIGHT = 4  # messages that a process may be ahead of the one it sends to


@contextmanager
def talking() -> Iterator[None]:
    """What torch.distributed raises when a process is lost, as a :class:`~spikeprop.errors.ProcessError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ProcessError):
            raise
        cause = str(error).splitlines()[0]
        raise ProcessError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost another one or waited for it in vain ({cause}); "
            "the first that ended says why"
        ) from None


def part_of(rows: int, rank: int, size: int) -> slice:
    """The rows of a batch that a process has: equal parts, the first ones larger by one where they cannot be."""
    each, more = divmod(rows, size)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


@dataclass(frozen=True)
class Share:
    """This process's part of a batch: ``rows`` of ``total``."""

    rows: int
    total: int

    def mean(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Means over all rows, from each process's means over its own; the same on every process."""
        flat = torch.cat([part.flatten() for part in parts]).mul_(self.rows / self.total)
        self.add_up(flat)
        sizes = [part.numel() for part in parts]
        return [found.view(part.shape) for found, part in zip(flat.split(sizes), parts, strict=True)]

    def add_up(self, numbers: Tensor) -> None:
        """Replace numbers by their sum over all processes."""
        with talking():
            dist.all_reduce(numbers)


class Pipe:
    """Tensors from a process to another, in order; the sender goes on while they travel."""

    def __init__(self, other: int) -> None:
        self.other = other
        self._sent: deque[Any] = deque()

    def send(self, parts: Sequence[Tensor]) -> None:
        """Begin to send tensors; waits only for what was sent :data:`IN_FLIGHT` messages before."""
        kinds = [number for part in parts for number in (DTYPES.index(part.dtype), part.dim(), *part.shape)]
        header, body = torch.tensor(kinds), torch.cat([part.reshape(-1).view(torch.uint8).cpu() for part in parts])
        message = (torch.tensor([len(header), len(body)]), header, body)
        with talking():
            self._sent.append(([dist.isend(tensor, self.other) for tensor in message], message))  # kept until it is gone
            while len(self._sent) > IN_FLIGHT:
                self._wait()

    def receive(self) -> list[Tensor]:
        """The next tensors that the other process sent."""
        lengths = torch.empty(2, dtype=torch.int64)
        with talking():
            dist.recv(lengths, self.other)
            header, body = torch.empty(int(lengths[0]), dtype=torch.int64), torch.empty(int(lengths[1]), dtype=torch.uint8)
            dist.recv(header, self.other)
            dist.recv(body, self.other)
        numbers, parts, start = iter(header.tolist()), [], 0
        for dtype in numbers:
            shape = [next(numbers) for _ in range(next(numbers))]
            stop = start + math.prod(shape) * DTYPES[dtype].itemsize
            own = body[start:stop].clone()  # a view of another type may not begin anywhere
            parts.append(own.view(DTYPES[dtype]).view(shape))
            start = stop
        return parts

    def finish(self) -> None:
        """Wait until everything was received."""
        with talking():
            while self._sent:
                self._wait()

    def _wait(self) -> None:
        for work in self._sent.popleft()[0]:
            work.wait()
