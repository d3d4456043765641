"""Folders of uploads below a fleet's registry: which are kept, for how long, and which are removed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine

from aioengine.errors import AdapterInvalid
from aioengine.fleet import uploads
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.uploads import KEEP_SECONDS, Uploads

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.mark.parametrize("scheme", ["", "file://"])
async def test_an_upload_in_use_is_kept(
    scheme: str, tiny_text: Tiny, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old it is, and also where replicas hold local copies of what is at a URL. What is invalid goes
    at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = small_engine(tiny_text)
    config = FleetConfig(engine=engine, registry=f"{scheme}{tmp_path}/registry")
    root = tmp_path / "registry" / "uploads"
    async with fleet_here(config, monkeypatch) as fleet:
        with pytest.raises(AdapterInvalid):
            await fleet.client.load_adapter_files("bad", b"{}", b"")
        assert not list(root.iterdir())
        monkeypatch.setattr(uploads, "KEEP_SECONDS", -1.0)
        for name in "ab":
            files = [(adapters / name / file).read_bytes() for file in FILES]
            await fleet.client.load_adapter_files(name, *files)
            await fleet.client.complete([5, 6, 7], greedy(1), adapter=name)
        kept = {folder.name for folder in root.iterdir()}
        assert kept == {info.digest for info in fleet.client.adapters()}


@given(st.lists(st.tuples(st.floats(0, 3 * KEEP_SECONDS), st.booleans()), min_size=1, max_size=8))
def test_an_upload_is_kept_for_a_while_after_its_last_use(uploaded: list[tuple[float, bool]]) -> None:
    """Each element is a later upload: seconds since the one before, and whether the first one is in use."""

    async def main(place: str) -> None:
        files = fsspec.filesystem("memory")
        files.store.clear()
        now = 0.0
        patch.setattr(uploads, "time", SimpleNamespace(monotonic=lambda: now))
        door = Uploads(place)
        folder = await door.store("sent", b"{}", b"")
        files.makedirs(f"{place}/uploads/new", exist_ok=True)  # another door is about to write there
        unused_since: float | None = None
        for seconds, used in uploaded:
            now += seconds
            await door.remove_unused([folder] if used else [])
            if used:
                unused_since = None
                assert files.exists(folder)
                continue
            unused_since = now if unused_since is None else unused_since
            assert files.exists(folder) == (now - unused_since <= KEEP_SECONDS)
            assert files.exists(f"{place}/uploads/new")
            if not files.exists(folder):
                return

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(main("memory://fleet"))


async def test_a_registry_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where the registry's own file is, in fsspec's reading of "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = await Uploads("~/registry").store("sent", b"{}", b"")
    root = fsspec.core.url_to_fs("~/registry")[1]
    assert Path(folder).parent == Path(root) / "uploads" == tmp_path / "registry" / "uploads"
