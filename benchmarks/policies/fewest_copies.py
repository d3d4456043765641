"""The fewest copies that any choice of victims can make, for requests that are served in order of arrival."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix


def fewest_copies(sizes: Sequence[int], wanted: Sequence[int], memory: int) -> float:
    """Return a lower bound on the copies into a memory of which each request needs one object.

    Where all objects have the same size, that is what Belady's rule makes (the victim whose next use is the
    furthest away), and no rule makes fewer. For objects of several sizes the fewest are hard to find, and
    this is the bound of Berger, Beckmann and Harchol-Balter, "Practical Bounds on Optimal Caching with
    Variable Object Sizes" (2018), section 4 (FOO): a linear program in which an object may be kept in part.
    Unlike there, what a request needs must be in the memory, so this much less is left for others.

    Args:
        sizes: Of each object, at most ``memory``.
        wanted: The object of each request, in order.
    """
    before: dict[int, int] = {}
    stays: list[tuple[int, int, int]] = []
    """(request, next request for the same object, size)"""
    for now, name in enumerate(wanted):
        if name in before:
            stays.append((before[name], now, sizes[name]))
        before[name] = now
    if not stays:
        return float(len(wanted))
    # x: the part of each stay that is kept; y: the bytes that are kept between two requests. In units of the
    # memory, so that the solver's tolerances fit.
    count, gaps = len(stays), len(wanted) - 1
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []

    def add(row: int, column: int, value: float) -> None:
        rows.append(row)
        columns.append(column)
        values.append(value)

    for gap in range(gaps):  # y[gap] = y[gap - 1] - what ends with request ``gap`` + what begins there
        add(gap, count + gap, 1.0)
        if gap:
            add(gap, count + gap - 1, -1.0)
    room = [1.0] * gaps
    for number, (begin, end, size) in enumerate(stays):
        add(begin, number, -size / memory)
        if end < gaps:
            add(end, number, size / memory)
    flow = csr_matrix((values, (rows, columns)), shape=(gaps, count + gaps))
    # While a request is served, its object lies there beside what is kept over it.
    rows, columns, values = [], [], []
    ends = {end: number for number, (_, end, _) in enumerate(stays)}
    for now in range(1, len(wanted)):
        size = sizes[wanted[now]]
        add(now - 1, count + now - 1, 1.0)
        if now in ends:
            add(now - 1, ends[now], -size / memory)
        room[now - 1] = 1.0 - size / memory
    beside = csr_matrix((values, (rows, columns)), shape=(gaps, count + gaps))
    gain = np.concatenate([-np.ones(count), np.zeros(gaps)])
    bounds = [(0.0, 1.0)] * count + [(0.0, None)] * gaps
    found = linprog(gain, A_ub=beside, b_ub=room, A_eq=flow, b_eq=np.zeros(gaps), bounds=bounds)
    if not found.success:
        raise RuntimeError(found.message)
    return len(wanted) + float(found.fun)
