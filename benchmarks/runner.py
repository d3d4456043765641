"""Runs cases: their calls take turns, and what they took becomes a table."""

from __future__ import annotations

import inspect
import statistics
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from math import nan
from typing import Any, NamedTuple

from benchmarks.report import Table, number, spread

Result = float | Mapping[str, float] | None
"""What a call returns: how much it has done, or figures by name with their units, or nothing."""
Call = Callable[[], Result | Awaitable[Result]]


class Calls(NamedTuple):
    """Calls to be measured, by what they differ in.

    A call that returns a number has done so many ``counted``: they are printed by second. One that returns
    figures has measured itself: the first is compared with that of the first call. One that returns nothing
    is compared by its time.
    """

    title: str
    calls: Mapping[str, Call]
    rounds: int = 5
    counted: str = "tokens"
    unit: str = "ms"
    """Of times: s, ms or us."""
    warm_up: int = 1
    """Rounds that are not counted."""
    note: str = ""


class Run(NamedTuple):
    """One run of a call."""

    figures: Mapping[str, float]
    seconds: float
    processor: float
    """Seconds of all threads of this process, which change less than ``seconds`` on a busy machine."""


UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


async def measure(calls: Calls) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """Run each call once a round, in every other round in the reverse order. Returns the runs, and why calls
    have failed; those do not run again."""
    runs: dict[str, list[Run]] = {name: [] for name in calls.calls}
    failed: dict[str, str] = {}
    for turn in range(calls.warm_up + calls.rounds):
        for name in calls.calls if turn % 2 == 0 else reversed(list(calls.calls)):
            if name in failed:
                continue
            try:
                run = await _timed(calls, calls.calls[name])
            except Exception as error:
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
                continue
            if turn >= calls.warm_up:
                runs[name].append(run)
    return runs, failed


async def _timed(calls: Calls, call: Call) -> Run:
    began, used = time.perf_counter(), time.process_time()
    result = call()
    if inspect.isawaitable(result):
        result = await result
    seconds, processor = time.perf_counter() - began, time.process_time() - used
    if result is None:
        return Run({}, seconds, processor)
    if isinstance(result, Mapping):
        return Run(result, seconds, processor)
    return Run({f"{calls.counted}/s": float(result) / seconds}, seconds, processor)


def table(calls: Calls, runs: Mapping[str, list[Run]], failed: Mapping[str, str]) -> Table:
    """Return medians, the least and the most of what is compared, and medians of all else."""
    names = list(dict.fromkeys(name for of in runs.values() for run in of for name in run.figures))
    scale, times = UNITS[calls.unit], f"time, {calls.unit}"
    measured_themselves = any(name != f"{calls.counted}/s" for name in names)
    main, *others = names or [times]

    def values(run: Run) -> dict[str, float]:
        own = {} if measured_themselves else {times: run.seconds * scale}
        return {**run.figures, **own, f"processor, {calls.unit}": run.processor * scale}

    if not measured_themselves:
        others = [times] * (main != times) + [f"processor, {calls.unit}"]
    first = next((name for name, of in runs.items() if of), "")
    several = calls.rounds > 1
    columns = ["", main, *["least .. most"] * several, f"of {first}", *others]
    rows = []
    for name, of in runs.items():
        if name in failed:
            rows.append([name, f"failed: {failed[name]}", *[""] * (len(columns) - 2)])
            continue
        found = [values(run) for run in of]
        base = [values(run).get(main, nan) for run in runs[first]]
        compared = [each.get(main, nan) for each in found]
        ratios = [a / b for a, b in zip(compared, base, strict=False) if b]
        cells = [name, number(statistics.median(compared)), *[spread(compared)] * several]
        cells.append(f"{statistics.median(ratios):.3f}" if ratios else "")
        cells += [number(statistics.median(each[other] for each in found)) if other in found[0] else ""
                  for other in others]  # fmt: skip
        rows.append(cells)
    return Table(calls.title, columns, rows, calls.note or f"Medians, rounds: {calls.rounds}.")


Yielded = Calls | Table | str
Case = Callable[..., AsyncGenerator[Yielded, None] | Generator[Yielded, None, None]]


async def run(parts: AsyncGenerator[Yielded, None] | Iterator[Yielded]) -> int:
    """Measure what a case yields, and print each table once it is there. Returns 1 if a call has failed."""
    code = 0
    async for part in _each(parts):
        if isinstance(part, Calls):
            runs, failed = await measure(part)
            code |= bool(failed)
            part = table(part, runs, failed)
        print(part, flush=True)
    return code


async def _each(parts: Any) -> AsyncGenerator[Yielded, None]:
    if not inspect.isasyncgen(parts):
        for part in parts:
            yield part
        return
    async for part in parts:
        yield part
