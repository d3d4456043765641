"""Two ranks, each in a process: the tokens of one, adapters that swap, and all or none of everything."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, greedy, prompt_of, register
from support.failure_harness import error_of, until
from support.process_harness import NothingLeft, worker_pids
from support.selection import mostly_slow
from support.tiny_models import ALL_MODULES, build_adapter

from aioengine import SamplingParams
from aioengine.errors import AdapterLoadError, EngineDead

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("fully", mostly_slow([False, True], True), ids=["half sharded", "fully sharded"])
async def test_two_ranks_give_the_tokens_of_one_while_adapters_swap(
    tiny_of: Callable[[str], Tiny], make_engine: MakeEngine, nothing_left: NothingLeft, fully: bool
) -> None:
    tiny = tiny_of("qwen2" if fully else "llama")
    names = ("rank-3", "qv-only", "patterns", "rslora")
    memory = "64KiB" if fully else None
    async with make_engine(
        tiny,
        executor="process",
        tensor_parallel_size=2,
        fully_sharded_loras=fully,
        slot_memory=memory,
        max_loras=3 if fully else 2,
    ) as engine:
        assert len(worker_pids()) == 2
        register(engine, tiny, *names)
        asked = [(prompt_of(i, 7), name) for i, name in enumerate((None, *names, None, *names))]
        await check_tokens(engine, tiny, asked, 12)
        assert engine.stats().slot_evictions > 0
        info = await engine.load_adapter("again", tiny.adapters["rank-3"], pin=True)
        assert info.location == "slot" and info.bytes > 0
        engine.check_invariants()
    await nothing_left.check()


@pytest.mark.usefixtures("preloaded_workers")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
async def test_a_crowd_changes_no_bit_on_two_ranks(tiny: Tiny, make_engine: MakeEngine) -> None:
    kinds = [SamplingParams(max_tokens=9, ignore_eos=True, logprobs=2, temperature=t, seed=3) for t in (0, 1)]
    names = ("rank-3", "qv-only", "patterns")
    requests = [(length, name, kind) for length in (5, 40) for name in (None, *names) for kind in kinds]
    async with make_engine(
        tiny, executor="process", tensor_parallel_size=2, dtype="bfloat16", block_size=16,
        batch_invariant=True, enable_prefix_caching=False, max_num_batched_tokens=32,
    ) as engine:  # fmt: skip
        register(engine, tiny, *names)

        async def answer(length: int, name: str | None, kind: SamplingParams) -> Sequence[object]:
            out = await engine.complete(prompt_of(length, length), kind, adapter=name)
            return out.token_ids, out.logprobs

        alone = [await answer(*request) for request in requests]
        loads = engine.stats().slot_loads
        assert await asyncio.gather(*(answer(*request) for request in requests)) == alone
        assert engine.stats().slot_loads > loads, "adapters were swapped"


@pytest.fixture(scope="session")
def dora(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """An adapter of which the ranks have to tell each other something, beside the others."""
    folder = tmp_path_factory.mktemp("dora")
    build_adapter(tiny.model, folder, r=5, use_dora=True, target_modules=[*ALL_MODULES, "lm_head"])
    return tiny._replace(adapters={**tiny.adapters, "dora": folder})


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("fully", mostly_slow([False, True], True), ids=["half sharded", "fully sharded"])
@pytest.mark.slow
async def test_an_adapter_is_on_all_ranks_or_on_none(
    dora: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft, tmp_path: Path, fully: bool
) -> None:
    """Content and errors are those of one rank that reads everything, whatever fails where and when."""
    modules = [*ALL_MODULES, "lm_head"]
    bad = shutil.copytree(dora.adapters["dora"], tmp_path / "bad")
    tensors = load_file(bad / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("layers.2.mlp.down_proj.lora_A.weight"))
    tensors[key][-1, -1] = torch.nan  # of rank 1's inputs
    save_file(tensors, bad / "adapter_model.safetensors")
    async with make_engine(dora, target_modules=modules) as alone:
        expected = await alone.load_adapter("dora", dora.adapters["dora"])
        refusal = await error_of(alone.load_adapter("bad", bad))
    async with make_engine(
        dora, executor="process", tensor_parallel_size=2, fully_sharded_loras=fully,
        target_modules=modules, load_timeout=1.5,
    ) as engine:  # fmt: skip
        info = await engine.load_adapter("dora", dora.adapters["dora"], pin=True)
        assert (info.digest, info.rank) == (expected.digest, expected.rank)
        await check_tokens(engine, dora, [(prompt_of(1, 7), "dora")])
        error = await error_of(engine.load_adapter("bad", bad))
        assert (type(error), str(error)) == (type(refusal), str(refusal))
        for name, reason in (
            ("fail-1", "a rank's disk is broken"),
            ("fail-0", "a rank's disk is broken"),
            ("memory-1", "not enough memory to hold it"),
            ("fail-end-1", "a rank's norms are broken"),
            ("hang-1", "load_timeout=1.5"),
            ("hang-end-1", "load_timeout=1.5"),
        ):
            own = shutil.copytree(dora.adapters["dora"], tmp_path / name)  # others of it fail at once
            error = await error_of(engine.load_adapter(name, own))
            assert isinstance(error, AdapterLoadError) and reason in str(error), name
        engine.register_adapter("place-1", dora.adapters["dora"])
        error = await error_of(engine.complete([5], greedy(3), adapter="place-1"))
        assert isinstance(error, AdapterLoadError) and "was prepared for slots of another model" in str(error)
        assert [slot.state for slot in engine.stats().slots] == ["READY", "FREE"]
        await check_tokens(engine, dora, [(prompt_of(2, 7), "dora")])
        engine.check_invariants()
    await nothing_left.check()


@pytest.mark.usefixtures("faulty")
@pytest.mark.slow
async def test_a_rank_that_is_killed_or_fails_takes_the_other_along(
    tiny: Tiny, make_engine: MakeEngine, nothing_left: NothingLeft
) -> None:
    fields = {"executor": "process", "tensor_parallel_size": 2, "restart": "on-failure", "max_model_len": 500}
    async with make_engine(tiny, **fields) as engine:
        running = asyncio.create_task(engine.complete([5], greedy(490)))
        await until(lambda: engine.stats().output_tokens > 2)
        pid = worker_pids()[1]
        os.kill(pid, signal.SIGKILL)
        error = await error_of(running)
        assert isinstance(error, EngineDead) and f"(process {pid}) was killed by SIGKILL" in str(error)
        await until(lambda: pid not in worker_pids() and len(worker_pids()) == 2)
        os.kill(worker_pids()[0], signal.SIGKILL)  # one that is just starting
        await check_tokens(engine, tiny, [([5, 6], None)])
        assert pid not in worker_pids() and len(worker_pids()) == 2
    await nothing_left.check()
