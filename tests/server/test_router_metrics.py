"""What a router reads of a real server: residency that follows loads, pins and evictions."""

from __future__ import annotations

import re

from support.engine_fixtures import Tiny
from support.server_fixtures import MODEL, Serve


async def test_residency_follows_the_engine(serve: Serve, tiny_text: Tiny) -> None:
    async with serve(metrics_compat="vllm", max_loras=1, max_cpu_loras=2) as served:
        engine = served.engine
        engine.register_adapter("b", tiny_text.adapters["a"])

        async def scrape() -> tuple[dict[str, str], dict[str, float]]:
            """Adapter -> level and whether it is pinned; and the numbers without labels but the model's."""
            text = (await served.http.get("/metrics")).text
            loaded = {}
            for labels in re.findall(r"^vllm:lora_adapter_loaded\{(.*)\} 1\.0$", text, re.MULTILINE):
                of = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                assert (of["model_name"], of["rank"]) == (MODEL, "4"), of
                loaded[of["adapter_name"]] = f"{of['level']} {of['pinned']}"
            pattern = rf'^vllm:(\w+)\{{engine="default",model_name="{MODEL}"\}} (\S+)$'
            return loaded, {k: float(v) for k, v in re.findall(pattern, text, re.MULTILINE)}

        loaded, numbers = await scrape()
        assert loaded == {} and numbers["max_gpu_lora_adapters"] == 1
        assert numbers["num_gpu_loaded_lora_adapters"] == numbers["num_cpu_loaded_lora_adapters"] == 0
        for name in ("a", "b"):
            await served.client.completions.create(model=name, prompt="x", max_tokens=1)
        loaded, numbers = await scrape()
        assert loaded == {"a": "cpu false", "b": "gpu false"}
        assert (numbers["num_gpu_loaded_lora_adapters"], numbers["num_cpu_loaded_lora_adapters"]) == (1, 2)
        assert (numbers["num_requests_running"], numbers["num_requests_waiting"]) == (0, 0)
        await engine.pin_adapter("b", force=True)
        assert (await scrape())[0]["b"] == "gpu true"
        await engine.unpin_adapter("b")
        await engine.unload_adapter("a")
        assert (await scrape())[0] == {"b": "gpu false"}
