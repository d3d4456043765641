"""Folders of uploads below a fleet's registry: which are kept, for how long, and which are removed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here

from aioengine import EngineConfig, LoRAConfig
from aioengine.fleet import uploads
from aioengine.fleet.config import FleetConfig

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("scheme", ["", "file://"])
async def test_an_upload_in_use_is_kept(
    scheme: str, tiny_text: Tiny, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old it is, and also where replicas hold local copies of what is at a URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = EngineConfig(
        model=str(tiny_text.model),
        dtype="float32",
        max_model_len=64,
        kv_cache_memory="4MiB",
        lora=LoRAConfig(max_loras=2, max_cpu_loras=4),
    )
    config = FleetConfig(engine=engine, registry=f"{scheme}{tmp_path}/registry")
    monkeypatch.setattr(uploads, "KEEP_SECONDS", -1.0)
    async with fleet_here(config, monkeypatch) as fleet:
        for name in "ab":
            files = [(adapters / name / file).read_bytes() for file in FILES]
            await fleet.client.load_adapter_files(name, *files)
            await fleet.client.complete([5, 6, 7], greedy(1), adapter=name)
        kept = {folder.name for folder in (tmp_path / "registry" / "uploads").iterdir()}
        assert kept == {info.digest for info in fleet.client.adapters()}
