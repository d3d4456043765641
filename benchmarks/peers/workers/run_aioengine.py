"""Times this engine: see `job.py`. Settings: `quantization`, `lora_dtype`, `kv_cache_memory` (or 1 GiB)."""

import asyncio

from job import read_job, run

import aioengine
from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams


async def main(job):
    adapters, settings = job["adapters"], job["settings"]
    config = EngineConfig(
        model=job["model"],
        dtype="bfloat16",
        quantization=settings["quantization"],
        max_model_len=4352,
        max_num_seqs=64,
        kv_cache_memory=settings.get("kv_cache_memory", "1GiB"),
        enable_prefix_caching=False,
        lora=LoRAConfig(max_loras=max(len(adapters), 1), max_lora_rank=16, lora_dtype=settings["lora_dtype"]),
    )
    async with AsyncEngine(config) as engine:
        for i, path in enumerate(adapters):
            await engine.load_adapter(str(i), path)

        async def stream(case, i):
            params = SamplingParams(max_tokens=case.output, ignore_eos=True)
            adapter = None if case.adapters[i] is None else str(case.adapters[i])
            found = []
            async for out in engine.generate(case.prompts[i], params, adapter=adapter):
                found += out.token_ids_delta
            return found

        async def all_at_once(case):
            return await asyncio.gather(*(stream(case, i) for i in range(len(case.prompts))))

        loop = asyncio.get_running_loop()

        def generate(case):
            return asyncio.run_coroutine_threadsafe(all_at_once(case), loop).result()

        await asyncio.to_thread(run, job, aioengine.__version__, generate)


if __name__ == "__main__":
    asyncio.run(main(read_job()))
