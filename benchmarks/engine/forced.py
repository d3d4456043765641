"""Gain of taking the tokens that a grammar forces without a step for each.

    python -m benchmarks.engine.forced
    python -m benchmarks.engine.forced --requests 1 8 32 --quantization int8

Each request asks for an order as JSON by a schema, whose names and punctuation leave the model no choice. The
same requests run with and without what the grammar forces, in turns; prints medians, and a warning if they
generated different tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, SamplingParams
from aioengine.guided import Guide
from aioengine.request import StartedConstraint

SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "shipping_city": {"enum": ["Lisbon", "Osaka", "Tromso", "Quito"]},
        "order_number": {"type": "string", "pattern": "^[A-F][0-9]{5}$"},
        "number_of_items": {"type": "integer", "minimum": 1, "maximum": 99},
        "is_urgent": {"type": "boolean"},
    },
    "required": ["customer_name", "shipping_city", "order_number", "number_of_items", "is_urgent"],
    "additionalProperties": False,
}


class Unforced:
    """The same constraint, asked for every token."""

    def __init__(self, inner: StartedConstraint) -> None:
        self._inner = inner
        self.begin, self.poll, self.allowed = inner.begin, inner.poll, inner.allowed

    @property
    def slow(self) -> bool:
        return self._inner.slow


async def run(
    engine: AsyncEngine, guide: Guide, prompts: Sequence[str], *, forced: bool
) -> tuple[float, int, list[list[int]]]:
    """Return (output tokens per second, steps, the tokens)."""

    async def one(i: int, prompt: str) -> Any:
        constraint: Any = await guide.json_schema(SCHEMA)
        chosen = constraint if forced else Unforced(constraint)
        params = SamplingParams(max_tokens=120, temperature=0.7, seed=i, constraint=chosen)
        return await engine.complete(prompt, params)

    began, steps = time.perf_counter(), engine.stats().steps
    outputs = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    seconds = time.perf_counter() - began
    tokens = [out.token_ids for out in outputs]
    return sum(map(len, tokens)) / seconds, engine.stats().steps - steps, tokens


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = EngineConfig(
        model=args.model, quantization=args.quantization, max_model_len=512, max_num_seqs=max(args.requests),
        kv_cache_memory="1GiB", lora=None, device="cpu",
    )  # fmt: skip
    table = Table(title=f"JSON by a schema, {args.quantization}, medians of {args.repeats}")
    for column in ("requests", "tok/s", "steps", "with forced", "steps", "", "same tokens"):
        table.add_column(column, justify="right")
    async with AsyncEngine(config) as engine:
        guide = Guide(engine)
        for requests in args.requests:
            rates: dict[bool, list[float]] = {False: [], True: []}
            steps: dict[bool, list[int]] = {False: [], True: []}
            same = True
            for round_ in range(args.repeats):
                rng = random.Random(round_)
                order = f"Order {rng.randrange(10**5)} of {rng.choice(['Ada', 'Boris', 'Elif'])} as JSON: "
                prompts = [f"{i}. {order}" for i in range(requests)]
                outputs = []
                for forced in (False, True) if round_ % 2 else (True, False):
                    rate, count, tokens = await run(engine, guide, prompts, forced=forced)
                    rates[forced].append(rate)
                    steps[forced].append(count)
                    outputs.append(tokens)
                same = same and outputs[0] == outputs[1]
            ratio = statistics.median(b / a for a, b in zip(rates[False], rates[True], strict=True))
            table.add_row(
                str(requests),
                f"{statistics.median(rates[False]):.0f}",
                f"{statistics.median(steps[False]):.0f}",
                f"{statistics.median(rates[True]):.0f}",
                f"{statistics.median(steps[True]):.0f}",
                f"{ratio:.2f}x",
                "yes" if same else "NO",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    asyncio.run(main())
