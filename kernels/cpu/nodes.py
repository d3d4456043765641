"""The processors that the threads of a step are bound to, on a machine with several NUMA nodes.

There a core reads the memory of its own node faster than that of others, and the system puts a page on the
node of the thread that writes to it first. So each thread stays on one core, and writes first to the weights
that it reads in steps (:func:`touch`). Pages are not moved afterwards: containers may not do that.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Sequence
from ctypes import c_int32
from pathlib import Path

from torch import Tensor

from aioengine.kernels.cpu.cores import cores
from aioengine.kernels.cpu.packed import PANEL
from aioengine.kernels.cpu.shared_library import load, threads

logger = logging.getLogger("aioengine")

Nodes = Sequence[Sequence[int]]
"""For each NUMA node, a processor of each physical core that this process may compute on."""


def processors_of_threads(rank: int = 0, ranks: int = 1) -> list[int]:
    """Return the processor of each thread of this rank's steps, where all ranks are on this machine; none if
    they are not to be bound.

    They are if there are several nodes, and the ranks' threads take all cores: otherwise somebody else is
    expected on the others, who may have bound threads to the same ones.
    """
    count = threads()
    if not hasattr(os, "sched_setaffinity") or len(nodes := _nodes()) < 2:
        return []
    taken = (count + 1) * ranks > sum(map(len, nodes)) and cores().quota >= count
    return spread(nodes, count, rank, ranks) if taken else []


def permitted(processors: Sequence[int]) -> Sequence[int]:
    """Try whether the system lets threads stay on ``processors``. Return them if so; else warn, and return
    none."""
    if not processors:
        return ()
    array, on = ((c_int32 * len(processors))(*found) for found in (processors, ()))
    load().aio_probe_bound(array, len(array), on)
    if list(on) == list(processors):
        return processors
    logger.warning(
        "the system does not let the threads of steps stay on processors %s (they were on %s): they are not "
        "bound, and weights may be far from the cores that read them (docs/performance.md)",
        *(list(processors), list(on)),
    )
    return ()


def spread(nodes: Nodes, count: int, rank: int = 0, ranks: int = 1) -> list[int]:
    """Return the processors of ``count`` threads of a rank; none if it has fewer cores.

    Ranks have equal parts of the cores, on as few nodes as possible. The threads of a rank are spread over
    its nodes, because a step reads all weights, and the memory of several nodes is faster. Those of a
    node follow each other, as the rows that they read do.
    """
    every = [processor for node in nodes for processor in node]
    own = every[rank * len(every) // ranks : (rank + 1) * len(every) // ranks]
    return [own[i * len(own) // count] for i in range(count)] if count <= len(own) else []


def find_nodes(processors: Iterable[int], root: Path = Path("/")) -> list[list[int]]:
    """Return the NUMA nodes that have some of these processors, as the files below ``root`` say: of each, the
    first processor of each physical core. One node if the system says nothing."""
    free = {number: number for number in sorted(processors)}  # by the first one of their core
    for number in free:
        siblings = _numbers(root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        free[number] = min(siblings & free.keys() | {number})
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    by_number = sorted((int(folder.name.removeprefix("node")), folder) for folder in folders)
    members = [_numbers(folder / "cpulist") & free.keys() for _, folder in by_number]
    if set().union(*members) != free.keys():
        members = [set(free)]
    return [sorted({free[number] for number in member}) for member in members if member]


def touch(memory: Tensor, rows: int, processors: Sequence[int]) -> None:
    """Have the threads of a step write first to the pages of a weight of so many rows that they read, if they
    have processors. No byte changes."""
    if processors and rows % PANEL == 0:
        array = (c_int32 * len(processors))(*processors)
        load().aio_touch(memory.data_ptr(), rows, memory.nbytes * PANEL // rows, array, len(array))


@functools.cache
def _nodes() -> Nodes:
    return find_nodes(os.sched_getaffinity(0))


def _numbers(path: Path) -> set[int]:
    """Return the numbers of a list such as "0-3,8"; none if there is no such file."""
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return set()
    ranges = (part.split("-") for part in text.strip().split(",") if part)
    return {number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)}
