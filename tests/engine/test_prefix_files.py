"""Pinned prefixes in files: back after a restart with the same bits, and never of something else."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support.engine_fixtures import MakeEngine, Tiny, prompt_of
from support.prefix_files import PIN, PREFIX, SCORED, files, running

from aioengine import CachePin
from aioengine.errors import ConfigError
from aioengine.kernels.cpu import build

pytestmark = pytest.mark.usefixtures("preloaded_workers")

COMPILED = {"dtype": "bfloat16", "block_size": 16, "batch_invariant": True}
KV_INT8 = {**COMPILED, "kv_cache_dtype": "int8"}
PROCESS = {"executor": "process"}
TWO_RANKS = {"executor": "process", "tensor_parallel_size": 2}
needs_compiler = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "bfloat16"},
        {"model_impl": "transformers"},
        pytest.param(COMPILED, marks=needs_compiler),
        pytest.param(KV_INT8, marks=needs_compiler),
        PROCESS,
        TWO_RANKS,
    ],
    ids=str,
)
@pytest.mark.slow
async def test_a_prefix_is_back_after_a_restart_with_the_same_bits(
    fields: dict[str, Any], tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    size = fields.get("block_size", 4)
    first = "0.k.0" if fields is TWO_RANKS else "k.0"
    whole = 40 // size * size
    async with running(make_engine, tiny, tmp_path / "kv", **fields) as moves:
        await moves.engine.complete([*PREFIX, 7], SCORED, cache_pins=[PIN])
        await moves.saved()
        expected = await moves.engine.complete([*PREFIX, 9], SCORED)
        assert expected.cached_tokens == whole
    [file] = files(tmp_path / "kv")
    assert file.stat().st_mode & 0o077 == 0 and file.parent.stat().st_mode & 0o077 == 0
    with safe_open(str(file), "pt") as opened:  # any reader of safetensors can
        assert len(opened.keys()) > 0 and opened.get_slice(first).get_shape()[0] == 40 // size
    async with running(make_engine, tiny, tmp_path / "kv", **fields) as moves:
        output = await moves.engine.complete([*PREFIX, 9], SCORED, cache_pins=[PIN])
        assert (output.cached_tokens, output.pinned_tokens) == (whole, whole)
        assert output.token_ids == expected.token_ids
        assert output.logprobs == expected.logprobs, "not only the tokens, but every bit"
        assert moves.count("loaded") == 1
        again = await moves.engine.complete([*PREFIX, 7], SCORED, cache_pins=[PIN])
        assert again.cached_tokens == whole and moves.count("loaded") == 1, "it was there"
        stats = moves.engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks
        labels = {"engine": "default", "action": "loaded"}
        assert moves.engine.metrics.registry.get_sample_value("aioengine_prefix_files_total", labels) == 1


@pytest.mark.slow
async def test_a_thread_and_a_process_have_the_same_files_and_ranks_others(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    for fields, found in (({}, 0), (PROCESS, 40), (TWO_RANKS, 0), ({}, 40)):
        async with running(make_engine, tiny, tmp_path, **fields) as moves:
            output = await moves.engine.complete([*PREFIX, 7], SCORED, cache_pins=[PIN])
            assert output.cached_tokens == found, fields
            assert output.token_ids == tiny.expected([*PREFIX, 7], 6)
            if not found:
                await moves.saved()
    assert len(files(tmp_path)) == 2


async def test_an_adapter_and_a_salt_have_their_own(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    asks: list[dict[str, Any]] = [
        {},
        {"adapter": "a"},
        {"cache_salt": "x"},
        {"adapter": "a", "cache_salt": "x"},
    ]
    async with running(make_engine, tiny, tmp_path) as moves:
        moves.engine.register_adapter("a", tiny.adapters["qv-only"])  # read when its request is there
        for ask in asks[:3]:
            await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN], **ask)
        await moves.saved(3)
    assert len(files(tmp_path)) == 3
    async with running(make_engine, tiny, tmp_path) as moves:
        await moves.engine.load_adapter("a", tiny.adapters["rank-3"])  # another content under this name
        found = [await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN], **ask) for ask in asks]
        assert [output.cached_tokens for output in found] == [40, 0, 40, 0]
        await moves.engine.load_adapter("a", tiny.adapters["qv-only"], replace=True)
        output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN], adapter="a")
        assert output.cached_tokens == 40
        assert output.token_ids == tiny.expected(PREFIX, 6, "qv-only")


async def test_another_model_or_layout_finds_nothing(
    tiny: Tiny, tiny_of: Callable[[str], Tiny], make_engine: MakeEngine, tmp_path: Path
) -> None:
    async with running(make_engine, tiny, tmp_path) as moves:
        await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        await moves.saved()
    for other, fields in (
        (tiny_of("qwen2"), {}),
        (tiny, {"dtype": "bfloat16"}),
        (tiny, {"block_size": 8}),
    ):
        async with running(make_engine, other, tmp_path, **fields) as moves:
            output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
            assert (output.cached_tokens, moves.count("loaded")) == (0, 0)
            await moves.saved()
    assert len(files(tmp_path)) == 4, "each has its own file beside the others'"


@pytest.mark.parametrize(
    ("first", "second", "adapter"),
    [
        ({}, {"lora_dtype": "int8"}, "a"),
        pytest.param(KV_INT8, {**KV_INT8, "dtype": "float32"}, None, marks=needs_compiler),
    ],
    ids=["adapters in int8", "another dtype with a cache in int8"],
)
async def test_keys_and_values_of_other_weights_are_not_taken(
    first: dict[str, Any],
    second: dict[str, Any],
    adapter: str | None,
    tiny: Tiny,
    make_engine: MakeEngine,
    tmp_path: Path,
) -> None:
    for fields in (first, second):
        async with running(make_engine, tiny, tmp_path, **fields) as moves:
            await moves.engine.load_adapter("a", tiny.adapters["qv-only"])
            output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN], adapter=adapter)
            assert (output.cached_tokens, moves.count("loaded")) == (0, 0)
            await moves.saved()
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "swap"])
async def test_a_bad_file_is_said_and_deleted_and_the_prefix_computed(
    harm: str, tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = prompt_of(2, 41)
    async with running(make_engine, tiny, tmp_path) as moves:
        for prompt in (PREFIX, other):
            await moves.engine.complete(prompt, SCORED, cache_pins=[PIN])
        await moves.saved(2)
    for path in files(tmp_path):
        data = bytearray(path.read_bytes())
        if harm == "swap":
            continue
        if harm == "flip":
            data[-1] ^= 1
        path.write_bytes(data[: {"cut": len(data) // 2, "flip": len(data), "empty": 0}[harm]])
    if harm == "swap":
        one, two = files(tmp_path)
        one.rename(tmp_path / "third")
        two.rename(one)
        (tmp_path / "third").rename(two)
    async with running(make_engine, tiny, tmp_path) as moves:
        output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        assert output.cached_tokens == 0 and output.token_ids == tiny.expected(PREFIX, 6)
        assert sum("deleted" in record.message for record in caplog.records) == 1
        await moves.saved()  # in its place
        assert moves.count("loaded") == 0
    async with running(make_engine, tiny, tmp_path) as moves:
        output = await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        assert output.cached_tokens == 40 and output.token_ids == tiny.expected(PREFIX, 6)


async def test_requests_that_come_together_share_one_read(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    async with running(make_engine, tiny, tmp_path) as moves:
        await moves.engine.complete(PREFIX, SCORED, cache_pins=[PIN])
        await moves.saved()
    async with running(make_engine, tiny, tmp_path) as moves:
        asks = [
            asyncio.ensure_future(moves.engine.complete([*PREFIX, i], SCORED, cache_pins=[PIN]))
            for i in range(8)
        ]
        await asyncio.sleep(0)
        asks[0].cancel()
        found = await asyncio.gather(*asks, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert [f.cached_tokens for f in found[1:] if not isinstance(f, BaseException)] == [40] * 7
        assert moves.count("loaded") == 1
        stats = moves.engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks


async def test_the_models_files_are_read_once_for_requests_that_come_together(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = hashlib.file_digest

    def count(file: Any, name: str) -> Any:
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", count)
    async with running(make_engine, tiny, tmp_path) as moves:
        asks = (moves.engine.complete(prompt_of(i, 41), SCORED, cache_pins=[PIN]) for i in range(4))
        await asyncio.gather(*asks)
    assert read and len(read) == len(set(read))


async def test_only_pins_that_ask_for_it_are_written(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    async with running(make_engine, tiny, tmp_path) as moves:
        pins = [CachePin(tokens=41), CachePin(tokens=9, save=True), CachePin(tokens=3, save=True)]
        await moves.engine.complete(PREFIX, SCORED, cache_pins=pins)
        await moves.saved()
        assert [move.tokens for move in moves.all] == [8]
    assert len(files(tmp_path)) == 1


async def test_a_folder_that_cannot_be_used_is_refused(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below"):
        with pytest.raises(ConfigError, match="kv_cache_dir"):
            await make_engine(tiny, kv_cache_dir=str(tmp_path / folder)).start()
