"""Whether steps after a pause take longer than others, and how much a machine's speed varies meanwhile.

    python -m benchmarks.policies.step_pauses --seconds 80

Runs the same two steps in turns: one after the other, after pauses of 1 ms to 1 s, and after 0.5 ms of other
work on the event loop's thread; and prints the median time of each kind, and its largest and smallest median
in a turn. All kinds are in each turn, so that the machine's own changes do not look like an effect of pauses.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import NamedTuple

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.lab.calibration.direct_steps import DirectSteps, Row
from aioengine.lab.calibration.probe import ProbedEngine
from benchmarks.shared.report import arguments, console, new_table

DECODE = (Row(1, 150),) * 3
PROMPT = (Row(96, 0),)


class Kind(NamedTuple):
    what: str
    count: int
    """Steps in each turn."""
    rows: tuple[Row, ...]
    pause: float = 0.0
    busy: float = 0.0


KINDS = (
    Kind("3 decodes", 20, DECODE),
    Kind("3 decodes, loop busy for 0.5 ms before", 20, DECODE, busy=0.0005),
    Kind("3 decodes, 1 ms after", 20, DECODE, 0.001),
    Kind("3 decodes, 10 ms after", 10, DECODE, 0.01),
    Kind("3 decodes, 100 ms after", 4, DECODE, 0.1),
    Kind("3 decodes, 1 s after", 1, DECODE, 1.0),
    Kind("3 decodes, after that one", 20, DECODE),
    Kind("a prompt of 96", 5, PROMPT),
    Kind("a prompt of 96, 100 ms after", 3, PROMPT, 0.1),
)


async def measure(model: str, seconds: float) -> dict[str, list[float]]:
    """Return the median seconds of each kind in each turn."""
    config = EngineConfig(model=model, kv_cache_memory="512MiB", lora=LoRAConfig(max_loras=1))
    found: dict[str, list[float]] = {kind.what: [] for kind in KINDS}
    async with ProbedEngine(config) as engine:
        steps = DirectSteps(engine, seed=0)
        await steps.fill(2048, 512)
        await steps.time(DECODE)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for kind in KINDS:
                found[kind.what].append(
                    statistics.median([await _time(steps, kind) for _ in range(kind.count)])
                )
    return found


async def _time(steps: DirectSteps, kind: Kind) -> float:
    if kind.pause:
        await asyncio.sleep(kind.pause)
    until = time.perf_counter() + kind.busy
    while time.perf_counter() < until:
        pass
    return (await steps.time(kind.rows)).seconds


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seconds", type=float, default=80.0)
    flags = parser.parse_args()
    found = asyncio.run(measure(flags.model, flags.seconds))
    table = new_table(f"steps of {flags.model}, ms", "step", "median", "least", "most")
    for what, medians in found.items():
        figures = statistics.median(medians), min(medians), max(medians)
        table.add_row(what, *(f"{1e3 * figure:.2f}" for figure in figures))
    console().print(table)


if __name__ == "__main__":
    main()
