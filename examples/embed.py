"""Embedding the engine: one base model, one adapter, one streamed answer."""

import asyncio

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams


async def main() -> None:
    config = EngineConfig(model="smollm2-135m", lora=LoRAConfig(max_loras=2, max_cpu_loras=3))
    async with AsyncEngine(config) as engine:
        await engine.load_adapter("sql", "examples/adapters/sql")
        prompt = [
            {"role": "system", "content": "Write the SQL query."},
            {"role": "user", "content": "What is the average age of employees whose city is Berlin?"},
        ]
        async for out in engine.generate(prompt, SamplingParams(max_tokens=40), adapter="sql"):
            print(out.text_delta, end="", flush=True)


asyncio.run(main())
