"""Tensor parallelism: which share of a model a process holds, and the sums and gathers between the shares.

No torch is imported with this module: planning needs :class:`Shard` alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """One of ``size`` equal shares of a model."""

    rank: int = 0
    size: int = 1
    fully_sharded: bool = False
    """Split all of an adapter's matrices, instead of one of each pair."""


SOLO = Shard()
"""The whole model."""


Ranges = tuple[slice, ...]
"""Ranges of a dimension that are taken together, one at least. More where one matrix has several linears
below each other, of each of which a rank has a part."""


def take(tensor: Tensor, ranges: Ranges) -> Tensor:
    """Return rows of ``tensor`` [n, ...]: a view if there is one range, else a copy."""
    if len(ranges) == 1:
        return tensor[ranges[0]]
    from torch import cat

    return cat([tensor[part] for part in ranges])


def rank_threads(size: int) -> int:
    """Return each of ``size`` ranks' share of the threads that a step here would have, at least 1."""
    from aioengine.kernels.cpu.cores import threads

    return max(1, threads() // size)


class Group(ABC):
    """The processes that hold one model together. All of them make the same calls in the same order.

    One thread makes all calls: a collective in another thread could overtake one of a step, and pair with
    another process's.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' ``x``, which must be contiguous and is overwritten with it."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """Return all ranks' ``x``, of one shape, concatenated along the last dimension in the order of the
        ranks."""


class SoloGroup(Group):
    """A group of one process with the whole model, which sums and gathers nothing."""

    def __init__(self) -> None:
        super().__init__(SOLO)

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x


class DistributedGroup(Group):
    """A group over ``torch.distributed``. gloo on a CPU and NCCL on CUDA differ only by the process group."""

    def __init__(self, process_group: ProcessGroup, shard: Shard) -> None:
        super().__init__(shard)
        self._process_group = process_group

    def all_reduce(self, x: Tensor) -> Tensor:
        from torch import distributed

        distributed.all_reduce(x, group=self._process_group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        from torch import distributed

        gathered = x.new_empty(self.shard.size, *x.shape)
        # Since torch 2.13 it goes by a new name, and the old one warns.
        name = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
        getattr(distributed, name)(gathered.flatten(0, 1), x.contiguous(), group=self._process_group)
        return gathered.movedim(0, -2).flatten(-2)
