"""Takes the picture of the live page that the README shows (docs/page.png), in two and a half minutes.

    python docs/screenshot.py [--seconds 150] [--out docs/page.png]

Needs what the tests need (make test installs it), and Chromium (Debian package chromium).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
from pathlib import Path

from playwright.async_api import async_playwright

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.server import ServerSettings, create_app
from aioengine.server.run import ListenSettings, listening

ADAPTERS = Path(__file__).resolve().parent.parent / "examples" / "adapters"
PROMPTS = {
    "sql": "How many orders were placed in 2021 by customers from Lyon?",
    "json": "Maria Keller, 34, lives in Graz and works as a nurse.",
    "sentiment": "The room was cold and nobody answered the phone.",
    "pirate": "The weather will be fine tomorrow, so we can leave early.",
}


async def client(engine: AsyncEngine, rng: random.Random) -> None:
    """One user, who asks, thinks, and asks again, mostly of the same adapter."""
    adapter = rng.choice(list(PROMPTS))
    while True:
        if rng.random() < 0.2:
            adapter = rng.choice(list(PROMPTS))
        messages = [{"role": "user", "content": PROMPTS[adapter]}]
        params = SamplingParams(max_tokens=rng.randint(16, 64), temperature=0.7, ignore_eos=True)
        await engine.complete(messages, params, adapter=adapter)
        await asyncio.sleep(rng.expovariate(0.5))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=150, help="of load before the picture is taken")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("page.png"))
    args = parser.parse_args()
    lora = LoRAConfig(max_loras=2, max_lora_rank=8, max_cpu_loras=3)
    config = EngineConfig(
        model="smollm2-135m", max_model_len=1024, kv_cache_memory="96MiB", max_num_seqs=8, lora=lora
    )
    async with AsyncEngine(config) as engine, async_playwright() as playwright:
        for name in PROMPTS:
            engine.register_adapter(name, ADAPTERS / name)
        clients = [asyncio.create_task(client(engine, random.Random(seed))) for seed in range(16)]
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        try:
            app = create_app(engine, ServerSettings(served_model_names=["smollm2-135m"]))
            async with listening(app, ListenSettings(port=0)) as url:
                page = await browser.new_page(viewport={"width": 1280, "height": 800})
                await page.goto(url)
                await asyncio.sleep(args.seconds)
                await page.screenshot(path=args.out)
        finally:
            await browser.close()
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    asyncio.run(main())
