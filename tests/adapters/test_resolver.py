"""Resolvers: which folder a name stands for, what is refused, and what is fetched when."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from support.waiting import until

from aioengine import AdapterResolver, ChainResolver, FilesystemResolver, FsspecResolver, HubResolver
from aioengine.adapters.resolvers import base as resolver_module
from aioengine.adapters.resolvers.base import MAX_WEIGHTS_BYTES, BlockingResolver
from aioengine.errors import AdapterError, AdapterInvalid, AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.model.files.sources import HubId, parse_hub_id


def adapter_folder(path: Path, weights: bytes = b"w") -> Path:
    """A folder that looks like an adapter's from outside."""
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


BAD_NAMES = ["..", "a/../b", "../a", "/etc", "a//b", "a/.", "./a", "a/", "", "a\0b", "a\\..\\b"]


# A folder


async def test_subfolders_are_found_by_name(tmp_path: Path) -> None:
    resolver = FilesystemResolver(tmp_path)
    with pytest.raises(AdapterNotFound, match="'sql'"):
        await resolver.resolve("sql")
    sql, nested = adapter_folder(tmp_path / "sql"), adapter_folder(tmp_path / "team" / "json")
    assert await resolver.resolve("sql") == sql, "it was not there before, and that is not remembered"
    assert await resolver.resolve("team/json") == nested
    with pytest.raises(AdapterNotFound):
        await resolver.resolve("team")  # a folder, but no adapter


async def test_links_may_not_leave_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside, outside = adapter_folder(root / "inside"), adapter_folder(tmp_path / "outside")
    (root / "link").symlink_to(inside)
    (root / "escape").symlink_to(outside)
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    partly = adapter_folder(root / "partly")
    (partly / "adapter_model.safetensors").unlink()
    (partly / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    pooled = adapter_folder(root / "pooled")
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").symlink_to(outside / "adapter_config.json")
    resolver = FilesystemResolver(root)
    assert await resolver.resolve("link") == inside
    for name in ("escape", "up/outside", "loop", "partly", "pooled"):
        with pytest.raises(AdapterNotFound) as caught:
            await resolver.resolve(name)
        assert str(tmp_path) not in str(caught.value), "says nothing of what is where"


async def test_a_root_may_itself_be_a_link(tmp_path: Path) -> None:
    first, second = adapter_folder(tmp_path / "v1" / "a"), adapter_folder(tmp_path / "v2" / "a")
    (tmp_path / "now").symlink_to(tmp_path / "v1")
    resolver = FilesystemResolver(tmp_path / "now")
    assert await resolver.resolve("a") == first
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to(tmp_path / "v2")
    assert await resolver.resolve("a") == second


def test_a_root_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter_root=.*nowhere"):
        FilesystemResolver(tmp_path / "nowhere")


# Threads


class Hanging(BlockingResolver):
    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.begun: list[str] = []

    def find(self, name: str) -> Path:
        self.begun.append(name)
        self.go.wait(30)
        return Path(name)


async def test_lookups_that_hang_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "MAX_THREADS", 2)
    resolver = Hanging()
    for name in ("first", "b", "first"):
        with pytest.raises(AdapterLoadError, match=r"load_timeout=0\.01"):
            await resolver_module.within(0.01, name, resolver.resolve(name))
    await until(lambda: len(resolver.begun) == 2)
    with pytest.raises(AdapterLoadError, match=r"2 look-ups.*first") as caught:
        await resolver.resolve("c")
    assert caught.value.transient
    assert sorted(resolver.begun) == ["b", "first"], "a name has one thread"
    joined = asyncio.create_task(resolver.resolve("b"))
    resolver.go.set()
    assert await joined == Path("b")
    assert await resolver.resolve("c") == Path("c")
    assert sorted(resolver.begun) == ["b", "c", "first"]


# A chain


class Table(AdapterResolver):
    def __init__(self, **known: str | Exception) -> None:
        self.known = known
        self.asked: list[str] = []

    async def resolve(self, name: str) -> str:
        self.asked.append(name)
        found = self.known.get(name)
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise AdapterNotFound("not in the table", name=name)
        return found


async def test_the_first_that_has_it_wins() -> None:
    first, second = Table(a="/1/a"), Table(a="/2/a", b="/2/b")
    chain = ChainResolver([first, second])
    assert await chain.resolve("a") == "/1/a"
    assert second.asked == []
    assert await chain.resolve("b") == "/2/b"
    with pytest.raises(AdapterNotFound, match="2 resolvers"):
        await chain.resolve("c")


async def test_a_resolver_that_cannot_tell_ends_the_search() -> None:
    broken, second = Table(a=AdapterLoadError("no network", name="a")), Table(a="/2/a")
    with pytest.raises(AdapterLoadError, match="no network"):
        await ChainResolver([broken, second]).resolve("a")
    assert second.asked == []


def test_a_chain_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="AdapterResolver"):
        ChainResolver([object()])  # type: ignore[list-item]


# The Hub

COMMIT = "1" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub leaves it: an adapter, and a repository that is none."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for repo, files in (
        ("org--sql", ["adapter_config.json", "adapter_model.safetensors"]),
        ("org--text", []),
    ):
        folder = cache / f"models--{repo}"
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        for file in files:
            (snapshot / file).write_text("{}")
        for ref in ("main", "v2"):
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / ref).write_text(COMMIT)
    return cache


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub cannot be reached: its address is a port of this machine that nobody listens on."""
    import huggingface_hub.constants
    import huggingface_hub.hf_api

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()


@pytest.mark.parametrize("name", ["org/sql", "hf:org/sql"])
async def test_the_hubs_cache_works_offline(hub_cache: Path, no_hub: None, name: str) -> None:
    folder = await HubResolver().resolve(name)
    assert folder == hub_cache / "models--org--sql" / "snapshots" / COMMIT


class FakeHub(BaseHTTPRequestHandler):
    """Has the repository org/sql, with files of the sizes in ``sizes``; notes what it is asked for."""

    sizes: ClassVar[dict[str, int]] = {}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path, *_ = self.path.split("?")
        file = path.rpartition("/")[2]
        headers = {"X-Repo-Commit": COMMIT}
        if path == "/api/models/org/sql/revision/main" or path == "/api/models/org/sql":
            siblings = [{"rfilename": name, "size": size} for name, size in self.sizes.items()]
            found = json.dumps({"id": "org/sql", "sha": COMMIT, "siblings": siblings}).encode()
        elif path == f"/api/models/org/sql/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "oid": name, "size": size} for name, size in self.sizes.items()
            ]
            found = json.dumps(tree).encode()
        elif file in self.sizes:
            found = b"x" * self.sizes[file]
            headers["ETag"] = f'"{file}"'
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(found))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(found)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def fake_hub(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    import huggingface_hub.constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    FakeHub.asked.clear()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield FakeHub
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


async def test_what_the_hub_has_is_downloaded(
    fake_hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fake_hub.sizes = {"adapter_config.json": 100, "adapter_model.safetensors": 1000, "optimizer.pt": 10**9}
    folder = await HubResolver().resolve("org/sql")
    assert (folder / "adapter_model.safetensors").stat().st_size == 1000
    assert not (folder / "optimizer.pt").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert await HubResolver().resolve("org/sql") == folder


@pytest.mark.parametrize(
    ("file", "size"),
    [("adapter_config.json", (256 << 10) + 1), ("adapter_model.safetensors", MAX_WEIGHTS_BYTES + 1)],
)
async def test_what_is_too_large_is_not_downloaded(
    fake_hub: type[FakeHub], tmp_path: Path, file: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fake_hub.sizes = {"adapter_config.json": 100, "adapter_model.safetensors": 1000, file: size}
    with pytest.raises(AdapterInvalid, match=f"{file} has.*at most"):
        await HubResolver().resolve("org/sql")
    assert len(fake_hub.asked) == 1, "nothing but what there is"
    assert not os.listdir(tmp_path)


async def test_a_revision_of_the_cache(hub_cache: Path, offline: None) -> None:
    assert HubResolver().fetch("x", "hf:org/sql@v2").name == COMMIT
    assert (await HubResolver().resolve("org/sql@v2")).name == COMMIT
    with pytest.raises(AdapterNotFound, match="offline"):
        HubResolver().fetch("x", "hf:org/sql@v3")


async def test_what_neither_hub_nor_cache_has(
    hub_cache: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AdapterLoadError, match=r"hf:org/other.*cannot be reached") as caught:
        await HubResolver().resolve("org/other")
    assert caught.value.transient
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterNotFound, match="offline"):
        await HubResolver().resolve("org/other")


async def test_a_repository_that_is_no_adapter(hub_cache: Path, offline: None) -> None:
    with pytest.raises(AdapterNotFound, match=r"adapter_config\.json"):
        await HubResolver().resolve("org/text")


@pytest.mark.parametrize("name", ["sql", "a/b/c", "org/../sql", "hf:x", "org/"])
async def test_names_that_are_no_repository(offline: None, name: str) -> None:
    with pytest.raises(AdapterNotFound, match="owner/name"):
        await HubResolver().resolve(name)


async def test_only_the_owners_that_are_served(hub_cache: Path, offline: None) -> None:
    assert (await HubResolver(["org"]).resolve("org/sql")).name == COMMIT
    with pytest.raises(AdapterNotFound, match="owner"):
        await HubResolver(["others"]).resolve("org/sql")


def test_hub_ids() -> None:
    assert parse_hub_id("org/name") == HubId("org/name", None)
    assert parse_hub_id("hf:org/na.me@refs/pr/1") == HubId("org/na.me", "refs/pr/1")
    for text in ("name", "./a/b", "a/b/c", "~/a", "/a/b", "../a", "hf:", "org/name@"):
        assert parse_hub_id(text) is None, text


# fsspec


@pytest.fixture
def store() -> Iterator[Any]:
    """An empty object store in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def put(store: Any, name: str, weights: bytes) -> None:
    store.pipe(f"/bucket/{name}/adapter_config.json", b"{}")
    store.pipe(f"/bucket/{name}/adapter_model.safetensors", weights)


async def test_what_is_fetched(store: Any, tmp_path: Path) -> None:
    put(store, "team/sql", b"weights")
    store.pipe("/bucket/team/sql/optimizer.pt", b"large")
    resolver = FsspecResolver("memory://bucket", cache_dir=tmp_path)
    folder = await resolver.resolve("team/sql")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"weights",
    }
    assert folder.is_relative_to(tmp_path)


async def test_what_has_not_changed_is_not_fetched_again(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a", b"1")
    first = await FsspecResolver("memory://bucket", cache_dir=tmp_path).resolve("a")
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "open", None)
        assert await FsspecResolver("memory://bucket", cache_dir=tmp_path).resolve("a") == first
    put(store, "a", b"2")
    second = await FsspecResolver("memory://bucket", cache_dir=tmp_path).resolve("a")
    assert second != first
    assert (first / "adapter_model.safetensors").read_bytes() == b"1", "it may still be served"
    assert (second / "adapter_model.safetensors").read_bytes() == b"2"


async def test_an_etag_says_whether_it_changed(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a", b"1")
    info = type(store).info
    monkeypatch.setattr(type(store), "info", lambda self, path: info(self, path) | {"ETag": '"same"'})
    resolver = FsspecResolver("memory://bucket", cache_dir=tmp_path)
    first = await resolver.resolve("a")
    put(store, "a", b"1")  # a new object, of the same content as its ETag says
    assert await resolver.resolve("a") == first


async def test_what_is_missing(store: Any, tmp_path: Path) -> None:
    store.pipe("/bucket/half/adapter_config.json", b"{}")
    resolver = FsspecResolver("memory://bucket", cache_dir=tmp_path)
    with pytest.raises(AdapterNotFound, match=r"memory://bucket/none.*adapter_config\.json"):
        await resolver.resolve("none")
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors"):
        await resolver.resolve("half")
    for name in BAD_NAMES:
        with pytest.raises(AdapterNotFound):
            await resolver.resolve(name)


async def test_sizes_are_bounded(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, "a", b"12345")
    monkeypatch.setattr(resolver_module, "MAX_WEIGHTS_BYTES", 4)
    with pytest.raises(AdapterInvalid, match=r"at most 4 B.*load the folder"):
        await FsspecResolver("memory://bucket", cache_dir=tmp_path).resolve("a")
    info = type(store).info
    monkeypatch.setattr(type(store), "info", lambda self, path: info(self, path) | {"size": None})
    with pytest.raises(AdapterInvalid, match="at most 4 B"):
        await FsspecResolver("memory://bucket", cache_dir=tmp_path).resolve("a")
    assert left_over(tmp_path) == []


async def test_a_change_while_it_is_fetched_is_noticed(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "a", b"old")
    open_ = type(store).open

    def change(self: Any, path: str, *args: Any) -> Any:
        file = open_(self, path, *args)
        monkeypatch.setattr(type(store), "open", open_)
        put(store, "a", b"new")
        return file

    monkeypatch.setattr(type(store), "open", change)
    resolver = FsspecResolver("memory://bucket", cache_dir=tmp_path)
    with pytest.raises(AdapterLoadError, match="changed") as caught:
        await resolver.resolve("a")
    assert caught.value.transient
    assert left_over(tmp_path) == []
    assert (await resolver.resolve("a") / "adapter_model.safetensors").read_bytes() == b"new"


def left_over(cache: Path) -> list[Path]:
    found = [p for p in cache.rglob("*") if not p.is_dir() or p.name.startswith(".part-")]
    return [p for p in found if p.name != ".lock"]  # locks that are taken away would be no locks


@pytest.fixture
def old(tmp_path: Path) -> Callable[[Path, int], None]:
    """``old(folder, n)``: the copy was used n days ago."""

    def age(folder: Path, days: int) -> None:
        then = time.time() - days * 86400
        os.utime(folder, (then, then))

    return age


async def test_local_copies_are_bounded(store: Any, tmp_path: Path, old: Callable[[Path, int], None]) -> None:
    """Those that were asked for least recently go; what is fetched now, or was a moment ago, stays."""
    resolver = FsspecResolver("memory://bucket", cache_dir=tmp_path, max_cache_bytes=3100)
    for name in "abcd":
        put(store, name, name.encode() * 1000)
    found = {name: await resolver.resolve(name) for name in "abc"}
    for days, name in enumerate("cba", start=1):
        old(found[name], days)
    assert await resolver.resolve("a") == found["a"], "it is used now"
    foreign = tmp_path / "notes" / "deep"
    foreign.mkdir(parents=True)
    old(foreign, 9)
    unfinished = found["a"].parent / ".part-of-a-process-that-was-killed"
    unfinished.mkdir()
    old(unfinished, 9)
    found["d"] = await resolver.resolve("d")
    there = {name for name, folder in found.items() if folder.is_dir()}
    assert there == {"a", "c", "d"}
    assert foreign.is_dir() and not unfinished.exists()
    assert (await resolver.resolve("b")).is_dir(), "it is fetched again"
    assert not found["c"].is_dir()


async def test_copies_in_use_are_kept_whatever_the_bound(store: Any, tmp_path: Path) -> None:
    resolver = FsspecResolver("memory://bucket", cache_dir=tmp_path, max_cache_bytes=1)
    for name in "ab":
        put(store, name, b"x")
    folders = [await resolver.resolve(name) for name in "ab"]
    assert all((folder / "adapter_model.safetensors").is_file() for folder in folders)
    for bad in (0, "many", -1):
        with pytest.raises(ConfigError, match="max_cache_bytes"):
            FsspecResolver("memory://bucket", cache_dir=tmp_path, max_cache_bytes=bad)


def test_what_fsspec_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        FsspecResolver("nonsense://bucket")


async def test_credentials_are_in_no_message(tmp_path: Path) -> None:
    resolver = FsspecResolver("memory://user:secret@bucket", cache_dir=tmp_path)
    with pytest.raises(AdapterError) as caught:
        await resolver.resolve("a")
    assert "secret" not in str(caught.value)
    assert "memory://bucket/a" in str(caught.value)
