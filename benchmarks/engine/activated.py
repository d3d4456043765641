"""Time to first token of an adapter that is asked about a conversation: activated LoRA against plain LoRA.

    python -m benchmarks.engine.activated --tokens 4096 --rounds 5

The base model computes a conversation of random tokens. Then each adapter is asked about it, with its
invocation at the end, and finally the base model continues. The activated adapter finds the conversation in
the prefix cache; the plain one has to compute it again.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from benchmarks.shared.report import arguments, console, new_table

MODEL = "smollm2-135m"
INVOCATION = [1000, 2000, 3000]


def write_adapters(root: Path) -> dict[str, Path]:
    spec = read_spec(resolve_model(MODEL))
    found = {name: write_random_adapter(root / name, spec, 16, seed=seed) for seed, name in enumerate(NAMES)}
    path = found["activated"] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alora_invocation_tokens": INVOCATION}))
    return found


NAMES = ("plain", "activated")


async def first_token(engine: AsyncEngine, prompt: list[int], adapter: str | None) -> tuple[float, int]:
    """Return the seconds to the first token, and how many prompt tokens the prefix cache had."""
    start, seconds, cached = time.perf_counter(), 0.0, 0
    async for output in engine.generate(
        prompt, SamplingParams(max_tokens=2, ignore_eos=True), adapter=adapter
    ):
        seconds = seconds or time.perf_counter() - start
        cached = output.cached_tokens
    return seconds, cached


async def measure(tokens: int, rounds: int) -> dict[str, list[tuple[float, int]]]:
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in (*NAMES, "base again")}
    config = EngineConfig(
        model=MODEL,
        dtype="bfloat16",
        max_model_len=tokens + 64,
        kv_cache_memory="1GiB",
        lora=LoRAConfig(max_loras=3, max_lora_rank=16),
    )
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncEngine(config) as engine:
            for name, path in write_adapters(Path(folder)).items():
                await engine.load_adapter(name, path, pin=True)
            for _ in range(rounds):
                chat = rng.choices(range(100, 900), k=tokens)
                await first_token(engine, chat, None)
                for name in NAMES:
                    found[name].append(await first_token(engine, [*chat, *INVOCATION], name))
                found["base again"].append(await first_token(engine, [*chat, 50], None))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of the conversation")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = asyncio.run(measure(options.tokens, options.rounds))
    title = f"{options.tokens} tokens of conversation, medians of {options.rounds}"
    table = new_table(title, "", "first token after", "tokens from the cache")
    for name, rows in found.items():
        seconds, cached = (median(column) for column in zip(*rows, strict=True))
        table.add_row(name, f"{seconds * 1e3:,.0f} ms", f"{cached:,.0f}")
    console().print(table)


if __name__ == "__main__":
    main()
