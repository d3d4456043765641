"""Replacing an adapter in two steps, as a fleet does it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of

from aioengine.errors import AdapterChanged, AdapterError, AdapterNotFound


async def test_prepared_is_not_used_before_it_is_committed(tiny: Tiny, make_engine: MakeEngine) -> None:
    prompt = prompt_of(0, 9)
    async with make_engine(tiny) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"], pin=True)
        await engine.prepare_adapter("x", tiny.adapters["qv-only"])
        before = await engine.complete(prompt, greedy(8), adapter="x")
        info = engine.commit_adapter("x")
        after = await engine.complete(prompt, greedy(8), adapter="x")
        engine.check_invariants()
    assert before.token_ids == tiny.expected(prompt, 8, "rank-3")
    assert after.token_ids == tiny.expected(prompt, 8, "qv-only")
    assert (info.version, info.pinned) == (2, True)


async def test_discarded_leaves_nothing(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine:
        await engine.load_adapter("x", tiny.adapters["rank-3"])
        await engine.prepare_adapter("x", tiny.adapters["qv-only"])
        engine.discard_adapter("x")
        with pytest.raises(AdapterNotFound, match="no version of it was prepared"):
            engine.commit_adapter("x")
        with pytest.raises(AdapterError):
            await engine.prepare_adapter("x", tiny.model)
        output = await engine.complete(prompt_of(0, 9), greedy(8), adapter="x")
        assert output.token_ids == tiny.expected(prompt_of(0, 9), 8, "rank-3")
        assert len(engine.resident()) == 1
        engine.check_invariants()


async def test_other_content_than_expected_is_refused(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """The files are changed while nothing of them is in memory."""
    path = tmp_path / "x"
    shutil.copytree(tiny.adapters["rank-3"], path)
    prompt = prompt_of(0, 9)
    async with make_engine(tiny, max_loras=1, max_cpu_loras=1) as engine:
        digest = (await engine.load_adapter("x", path)).digest
        await engine.prepare_adapter("x", read=False)
        engine.commit_adapter("x")
        engine.expect_adapter("x", digest)
        output = await engine.complete(prompt, greedy(8), adapter="x")
        assert output.token_ids == tiny.expected(prompt, 8, "rank-3"), "it is what is expected"
        await engine.load_adapter("other", tiny.adapters["rank-4"])
        assert [info.name for info in engine.resident()] == ["other"]
        shutil.rmtree(path)
        shutil.copytree(tiny.adapters["qv-only"], path)
        with pytest.raises(AdapterChanged, match=f"{digest[:12]}... is expected; load it again"):
            await engine.complete(prompt, greedy(8), adapter="x")
        engine.check_invariants()
        await engine.load_adapter("x", replace=True)
        output = await engine.complete(prompt, greedy(8), adapter="x")
        assert output.token_ids == tiny.expected(prompt, 8, "qv-only"), "the new version may be anything"
        await engine.unload_adapter("x")
        with pytest.raises(AdapterNotFound):
            engine.expect_adapter("x", digest)
