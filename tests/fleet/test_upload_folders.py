"""Folders of uploads below a fleet's registry: which are kept, for how long, and which are removed."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import fsspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine
from support.registry_actor import RegistryActor
from support.waiting import until

from aioengine.errors import AdapterConflict, AdapterInvalid
from aioengine.fleet import uploads
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.entries import KnownEntries
from aioengine.fleet.registry import Entry
from aioengine.fleet.uploads import KEEP_SECONDS, Uploads
from aioengine.schedulers.routing import FleetState

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

FILES = ("adapter_config.json", "adapter_model.safetensors")


class Gateway(Uploads):
    """A gateway's uploads. ``loaded``: the folders that it knows adapters to be loaded from."""

    def __init__(self, registry: str) -> None:
        self.loaded: list[str] = []
        super().__init__(registry, lambda: self.loaded)


async def stored(gateway: Gateway, content: bytes = b"") -> str:
    """Upload an adapter, and load it for a moment. Returns its folder."""
    async with gateway.stored("sent", b"{}", content) as folder:
        gateway.loaded.append(folder)
    gateway.loaded.remove(folder)
    await gateway.stop()
    return folder


@pytest.mark.parametrize("scheme", ["", "file://"])
async def test_an_upload_in_use_is_kept(
    scheme: str, tiny_text: Tiny, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old it is, and also where replicas hold local copies of what is at a URL. What is invalid goes
    at once, but not what another version was replaced by, or has replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engine = small_engine(tiny_text)
    config = FleetConfig(engine=engine, registry=f"{scheme}{tmp_path}/registry")
    root = tmp_path / "registry" / "uploads"
    async with fleet_here(config, monkeypatch) as fleet:
        with pytest.raises(AdapterInvalid):
            await fleet.client.load_adapter_files("bad", b"{}", b"")
        assert not list(root.iterdir())
        first, second = ([(adapters / name / file).read_bytes() for file in FILES] for name in "ab")
        before = await fleet.client.load_adapter_files("s", *first)
        await fleet.client.load_adapter_files("s", *second, replace=True)
        with pytest.raises(AdapterConflict, match="already registered"):
            await fleet.client.load_adapter_files("s", *first)
        assert [folder for folder in root.iterdir() if folder.name.startswith(before.digest)]
        monkeypatch.setattr(uploads, "KEEP_SECONDS", -1.0)
        for name in "ab":
            files = [(adapters / name / file).read_bytes() for file in FILES]
            await fleet.client.load_adapter_files(name, *files)
            await fleet.client.complete([5, 6, 7], greedy(1), adapter=name)
        kept = {info.digest for info in fleet.client.adapters()}
        await until(lambda: sorted(folder.name[:64] for folder in root.iterdir()) == sorted(kept))


class Loaded(NamedTuple):
    """A change by one of two gateways: an upload, or a load from a folder that is there."""

    seconds: float
    """Since the one before."""
    gateway: int
    content: int
    uploads: bool


LOADS = st.builds(Loaded, st.floats(0, 2 * KEEP_SECONDS), st.integers(0, 1), st.integers(0, 2), st.booleans())


@settings(deadline=None, max_examples=50)
@given(st.lists(LOADS, min_size=2, max_size=8))
@example(
    [
        Loaded(0.0, 0, 0, uploads=True),
        Loaded(10.0, 0, 1, uploads=True),  # this gateway sees that the first one is not in use
        Loaded(10.0, 1, 0, uploads=False),  # and then it is again
        Loaded(KEEP_SECONDS, 0, 2, uploads=True),
    ]
)
@pytest.mark.slow
def test_what_one_gateway_loads_another_does_not_remove_too_soon(loads: list[Loaded]) -> None:
    """Each hears of the other's changes, and removes what it knows to be unused, when it makes one."""

    async def main(place: str) -> None:
        files = fsspec.filesystem("memory")
        files.store.clear()
        files.pseudo_dirs[:] = [""]
        now, folder = 0.0, ""
        patch.setattr(uploads, "time", SimpleNamespace(monotonic=lambda: now))
        registry = RegistryActor()
        gateways = [Gateway(place), Gateway(place)]
        known = [KnownEntries({}, FleetState(lambda: now)) for _ in gateways]
        for each, gateway in zip(known, gateways, strict=True):
            each.in_use = gateway.in_use
        folders: dict[int, str] = {}
        until: dict[str, float] = {}
        entry: Entry | None = None
        for version, load in enumerate(loads, 1):
            now += load.seconds
            wanted = folders.get(load.content, "")
            if load.uploads or not files.exists(wanted):
                wanted = folders[load.content] = await stored(gateways[load.gateway], bytes([load.content]))
            until[folder], folder = now, wanted
            before, entry = entry, Entry("sql", folder, version)
            assert await registry.change.remote("sql", before, entry) == (True, entry)
            for each in known:
                await each.refresh(registry)
            gateways[load.gateway].loaded = [folder]
            await gateways[load.gateway].remove_unused()
            for path, end in until.items():
                assert not path or now - end > KEEP_SECONDS or files.exists(path)
            assert files.exists(folder)

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(main("memory://fleet"))


@pytest.mark.parametrize(
    ("when", "again"),
    [(when, again) for when in ("_names", "_remove") for again in ("here", "at another")]
    + [("_names", "is loaded")],
)
async def test_an_upload_that_comes_again_during_a_removal_stays(
    when: str, again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the removal does just then, and although it has not been in use for long."""
    monkeypatch.setattr(uploads, "KEEP_SECONDS", 0.0)
    gateway = other = Gateway(str(tmp_path))
    if again == "at another":
        other = Gateway(str(tmp_path))
    folder = await stored(gateway)
    await gateway.remove_unused()  # it sees that nobody uses it
    begun, go_on, real = threading.Event(), threading.Event(), getattr(uploads, when)

    def held(*arguments: str) -> Any:
        found = None if when == "_remove" else real(*arguments)
        begun.set()
        assert go_on.wait(60)
        return real(*arguments) if when == "_remove" else found

    monkeypatch.setattr(uploads, when, held)
    removal = asyncio.create_task(gateway.remove_unused())
    await until(begun.is_set)
    if again == "is loaded":
        gateway.loaded.append(folder)
        gateway.in_use(folder)
    else:
        folder = await stored(other)
    go_on.set()
    await removal
    assert set(os.listdir(folder)) == set(FILES)


async def test_no_answer_waits_for_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one at a time: those that end while it is under way begin no other."""
    go_on, lists = threading.Event(), 0

    def held(root: str) -> list[str]:
        nonlocal lists
        lists += 1
        assert go_on.wait(60)
        return []

    monkeypatch.setattr(uploads, "_names", held)
    gateway = Gateway(str(tmp_path))
    for content in range(4):
        with suppress(AdapterInvalid):
            async with gateway.stored("sent", b"{}", bytes([content])) as folder:
                if content == 1:
                    raise AdapterInvalid("it is not an adapter", name="sent")
        assert (Path(folder).name in os.listdir(Path(folder).parent)) == (content != 1)
        await until(lambda: lists > 0)
    go_on.set()
    await until(lambda: not gateway._background.tasks)
    assert lists == 1
    await gateway.stop()


async def test_a_registry_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where the registry's own file is, in fsspec's reading of "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = await stored(Gateway("~/registry"))
    root = fsspec.core.url_to_fs("~/registry")[1]
    assert Path(folder).parent == Path(root) / "uploads" == tmp_path / "registry" / "uploads"
