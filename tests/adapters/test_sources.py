"""Adapters by URL: fetched once on a machine, checked, and clear errors; S3 by a server of moto's."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.engine_fixtures import Tiny
from support.s3_server import check_keys_after, put, s3, s3_server

from aioengine import AsyncEngine, EngineConfig, FsspecResolver, LoRAConfig, SamplingParams
from aioengine.adapters.resolvers.sources import checked_path, fetch_source, source_below
from aioengine.errors import AdapterInvalid, AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.kernels import available_backends

__all__ = ["s3", "s3_server"]

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


@pytest.fixture(scope="module")
def kernels() -> None:
    """They are loaded from the user's own cache, before ``s3`` has another in its place."""
    available_backends("cpu")


@pytest.mark.slow
async def test_an_engine_serves_an_adapter_from_s3(kernels: None, s3: Any, tiny: Tiny) -> None:
    source = tiny.adapters["qv-only"]
    put(s3, "team/sql", {path.name: path.read_bytes() for path in source.iterdir()})
    config = EngineConfig(
        model=str(tiny.model),
        dtype="float32",
        device="cpu",
        kv_cache_memory="4MiB",
        lora=LoRAConfig(adapter_root="s3://lora/team"),
    )
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    async with AsyncEngine(config) as engine:
        engine.register_adapter("local", source)
        await engine.load_adapter("given", "s3://lora/team/sql/")
        expected = (await engine.complete([5, 6, 7], params, adapter="local")).token_ids
        assert expected != (await engine.complete([5, 6, 7], params)).token_ids
        for name in ("given", "sql"):  # "sql" is found below the root
            assert (await engine.complete([5, 6, 7], params, adapter=name)).token_ids == expected
        with pytest.raises(AdapterNotFound, match=r"s3://lora/team/none"):
            await engine.complete([5], params, adapter="none")


@pytest.mark.slow
def test_gone_denied_and_unknown(s3: Any, s3_server: str) -> None:
    put(s3, "b", FILES)
    with pytest.raises(AdapterNotFound, match=r"s3://lora/none.*there is no adapter_config\.json$"):
        fetch_source("a", "s3://lora/none")
    with pytest.raises(AdapterNotFound, match=r"s3://elsewhere/a.*nothing else at s3://elsewhere: check the"):
        fetch_source("a", "s3://elsewhere/a")
    put(s3, "a", FILES)
    assert fetch_source("a", "s3://lora/a").is_dir()
    check_keys_after(s3_server, "0")
    try:
        with pytest.raises(
            AdapterLoadError, match=r"s3://lora/a.*access is denied.*check the credentials"
        ) as caught:
            fetch_source("a", "s3://lora/a")
        assert not caught.value.transient
    finally:
        check_keys_after(s3_server, "inf")


def test_without_credentials(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(s3, "a", FILES)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(AdapterLoadError, match=r"s3://lora/a.*no valid credentials.*environment") as caught:
        fetch_source("a", "s3://lora/a")
    assert not caught.value.transient


class OfTheCloud(Exception):
    """Google's errors say it in a field."""

    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")
        self.code = code


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (PermissionError("no"), True),
        (OSError("Forbidden: bucket/a\nno access"), True),
        (OfTheCloud(401), True),
        (OfTheCloud("403"), True),
        (OfTheCloud(503), False),
        (OSError("connection reset"), False),
        (TimeoutError("late"), False),
    ],
)
async def test_whether_it_helps_to_try_again(
    error: Exception, refused: bool, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(type(store), "info", fails)
    with pytest.raises(AdapterLoadError, match=r"memory://bucket/a") as caught:
        FsspecResolver("memory://bucket", cache_dir=tmp_path).find("a")
    assert caught.value.transient is not refused
    assert ("check the credentials" in str(caught.value)) is refused
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "source", "extra"),
    [
        ("s3fs", "s3://lora/a", "s3"),
        ("gcsfs", "gs://lora/a", "gcs"),
        ("gcsfs", "gcs://lora/a", "gcs"),
        ("fsspec", "memory://lora/a", "fsspec"),
        ("huggingface_hub", "hf://owner/a", "hub"),
    ],
)
def test_a_missing_package_is_one_command(
    missing: str, source: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == missing else find(name, *more)
    )
    loaded = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(loaded, source.split(":")[0], raising=False)
    with pytest.raises(ConfigError, match=rf"{source.split(':')[0]}.* pip install 'aioengine\[{extra}\]'$"):
        checked_path("a", source)


@pytest.fixture
def store() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    for name, data in FILES.items():
        files.pipe(f"/bucket/a/{name}", data)
    yield files
    files.store.clear()


def test_many_at_once_fetch_it_once(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own resolver, as processes have: what holds them back is a lock on a file."""
    opened: list[str] = []
    gate, open_ = threading.Barrier(4), type(store).open

    def slow(self: Any, path: str, *args: Any, **options: Any) -> Any:
        opened.append(path)
        return open_(self, path, *args, **options)

    def find(_: int) -> Path:
        resolver = FsspecResolver("memory://bucket", cache_dir=tmp_path)
        gate.wait()
        return resolver.find("a")

    monkeypatch.setattr(type(store), "open", slow)
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(find, range(4)))) == 1
    assert len(opened) == len(FILES)


def test_a_copy_of_which_a_part_is_gone_is_fetched_again(store: Any, tmp_path: Path) -> None:
    weights = FsspecResolver("memory://bucket", cache_dir=tmp_path).find("a") / "adapter_model.safetensors"
    weights.unlink()
    assert (FsspecResolver("memory://bucket", cache_dir=tmp_path).find("a") / weights.name).is_file()


def test_a_whole_copy_needs_no_lock(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may be another user's, or on a disk that is read-only: in an image, for example."""
    found = FsspecResolver("memory://bucket", cache_dir=tmp_path).find("a")

    def denied(*args: Any, **options: Any) -> None:
        raise PermissionError("for this test")

    for module, name in (("fcntl", "flock"), ("os", "utime"), ("pathlib.Path", "mkdir")):
        monkeypatch.setattr(f"{module}.{name}", denied)
    assert FsspecResolver("memory://bucket", cache_dir=tmp_path).find("a") == found


def test_what_a_path_may_be(tmp_path: Path) -> None:
    assert checked_path("a", f"file://{tmp_path}/my%20lora") == f"{tmp_path}/my lora"
    assert checked_path("a", "hf://owner/name@main") == "hf:owner/name@main"
    assert checked_path("a", "s3://lora/a/") == "s3://lora/a"
    with pytest.raises(AdapterInvalid, match="file:///absolute/path"):
        checked_path("a", "file://host/a")
    with pytest.raises(ConfigError, match="nothing://x"):
        checked_path("a", "nothing://x")


def test_a_root_that_is_a_file_url_is_a_folder() -> None:
    """So that links out of it are not followed, as in any folder."""
    assert LoRAConfig(adapter_root="file:///srv/my%20loras").adapter_root == "/srv/my loras"
    assert LoRAConfig(adapter_root="s3://lora/a%20b").adapter_root == "s3://lora/a%20b"
    for url in ("file://host/loras", "file://[/loras"):
        with pytest.raises(ConfigError, match="adapter_root="):
            LoRAConfig(adapter_root=url)


@pytest.mark.parametrize(
    "path",
    [
        *("../secret/a", "s3://other/a", "/etc", ""),
        *(f"x/{part}/a" for part in ("%2e%2e", ".%2E", "..%2f..", ".\t.", ".\n.", "b?c", "b#c", "b;c")),
        *("x::file/a", "::a", "simplecache::x", "x\x7f/a", "x/\\../a", " x", "x /a", "*/a", "[a]"),
    ],
)
def test_only_what_is_below_the_root_is_loaded_over_http(path: str) -> None:
    assert source_below("s3://lora/team/", "a", "s3://lora/team/x") == "s3://lora/team/x"
    assert source_below("s3://lora/team", "a", "./x/y/") == "s3://lora/team/x/y"
    for odd in ("run=5,é/a", "x/a b:c@1+2~3"):
        assert source_below("s3://lora/team", "a", odd) == f"s3://lora/team/{odd}"
    assert source_below("/adapters", "a", path) is None
    with pytest.raises(AdapterNotFound, match="not a path below"):
        source_below("s3://lora/team", "a", path)
