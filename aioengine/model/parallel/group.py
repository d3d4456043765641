"""Tensor parallelism: which share of a model a process holds, and the sums and gathers between the shares.

No torch is imported with this module: planning needs :class:`Shard` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


Step = Callable[[], object]
Record = Callable[[Step], Step]
"""Function that records a step. It returns a function that computes the step again, from and into the same
memory."""


class Shard(NamedTuple):
    """One of ``size`` equal shares of a model."""

    rank: int = 0
    size: int = 1
    fully_sharded: bool = False
    """Split all of an adapter's matrices, instead of one of each pair."""


SOLO = Shard()
"""The whole model."""


class Traffic:
    """Count of what a rank has sent since this was created or reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.all_reduces = 0
        """Number of calls."""
        self.all_gathers = 0
        """Number of calls."""
        self.nbytes = 0
        """Bytes that this rank sends if both are done in a ring, which is the least that they take:
        ``2 (size - 1) / size`` of an all-reduce's tensor (Patarasuk & Yuan, 2009,
        https://doi.org/10.1016/j.jpdc.2008.09.002), and ``size - 1`` times a gather's own part."""

    def counting(self, record: Record) -> Record:
        """Return a ``record`` whose steps are counted when they are played back, too: then they do not call
        the group."""

        def counts() -> tuple[int, int, int]:
            return self.all_reduces, self.all_gathers, self.nbytes

        def recorded(step: Step) -> Step:
            each = (0, 0, 0)

            def run() -> None:
                nonlocal each
                before = counts()
                step()
                now = counts()
                each = (now[0] - before[0], now[1] - before[1], now[2] - before[2])

            played = record(run)

            def play() -> None:
                before = counts()
                played()
                self.all_reduces, self.all_gathers = before[0] + each[0], before[1] + each[1]
                self.nbytes = before[2] + each[2]

            return play

        return recorded


class Group(ABC):
    """The processes that hold one model together. All of them make the same calls in the same order.

    One thread makes all calls: a collective in another thread could overtake one of a step, and pair with
    another process's.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.traffic = Traffic()

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' ``x``, which must be contiguous and is overwritten with it."""

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Return all ranks' ``x``, of one shape, concatenated along ``dim`` in the order of the ranks."""


class SoloGroup(Group):
    """A group of one process with the whole model, which sums and gathers nothing."""

    def __init__(self) -> None:
        super().__init__(SOLO)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x


class DistributedGroup(Group):
    """A group over ``torch.distributed``. gloo on a CPU and NCCL on CUDA differ only by the process group."""

    def __init__(self, process_group: ProcessGroup, shard: Shard) -> None:
        super().__init__(shard)
        self._process_group = process_group

    def all_reduce(self, x: Tensor) -> Tensor:
        from torch import distributed

        distributed.all_reduce(x, group=self._process_group)
        self.traffic.all_reduces += 1
        self.traffic.nbytes += 2 * (self.shard.size - 1) * x.nbytes // self.shard.size
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        from torch import distributed

        size, dim = self.shard.size, dim % x.dim()
        gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
        # Since torch 2.13 it goes by a new name, and the old one warns.
        name = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
        getattr(distributed, name)(gathered, x.contiguous(), group=self._process_group)
        self.traffic.all_gathers += 1
        self.traffic.nbytes += (size - 1) * x.nbytes
        # [size, ...] -> the axis of ranks directly before ``dim``, and one with it.
        by_rank = gathered.view(size, *x.shape).movedim(0, dim)
        return by_rank.reshape(*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :])
