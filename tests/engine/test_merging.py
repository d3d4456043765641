"""Merged weights in a whole engine, against PEFT's own merge in float32."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.tiny_models import build_adapter, build_model
from support.trained_tokens import build_trained
from support.waiting import until

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams, events
from aioengine.errors import ConfigError
from aioengine.memory_plan import plan_from_config
from aioengine.model.slots.merged import MergedDecoder
from aioengine.schedulers import Decision, SchedulerPolicy, SchedulerView, load_policy
from aioengine.schedulers.policies.fcfs import FCFS

pytestmark = pytest.mark.usefixtures("preloaded_workers")

PROMPT = prompt_of(3, 11)
PATHS: dict[str, dict[str, Any]] = {
    "torch": {},
    "compiled": {"block_size": 16},
    "int8-adapters": {"block_size": 16, "lora_dtype": "int8"},
    "shared-memory": {"block_size": 16, "slot_memory": "shared", "kv_cache_memory": "2MiB"},
}


class Merge(SchedulerPolicy):
    """fcfs, which merges ``name``."""

    def __init__(self) -> None:
        self.inner = FCFS()
        self.name: str | None = None

    def schedule(self, view: SchedulerView) -> Decision:
        decision = self.inner.schedule(view)
        return decision if self.name is None else decision._replace(merge=[self.name])


class Steps:
    """The steps of an engine: the adapters of each, and whether it was merged."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.seen: list[tuple[int, bool]] = []
        engine.add_listener(self)

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.StepFinished):
            self.seen.append((event.adapters, event.merged))

    def taken(self) -> list[tuple[int, bool]]:
        seen, self.seen = self.seen, []
        return seen


async def merge(engine: AsyncEngine, policy: Merge, name: str) -> None:
    """Have the adapter merged, while a request for it runs."""
    policy.name = name
    await engine.complete(PROMPT, greedy(2), adapter=name)
    await until(lambda: engine.stats().merged == name)


def merged_by_peft(model: Path, adapter: Path, count: int) -> list[int]:
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = PeftModel.from_pretrained(base, adapter)
    found.merge_adapter()
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            logits = found(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    ("path", "family"),
    [("torch", "llama"), ("compiled", "llama"), ("compiled", "qwen2"), ("compiled", "gemma2")],
)
@pytest.mark.slow
async def test_tokens_are_those_of_pefts_merge(
    path: str, family: str, tiny_of: Callable[[str], Tiny], make_engine: MakeEngine
) -> None:
    tiny = tiny_of(family)
    policy = Merge()
    async with make_engine(tiny, policy, merge=True, enable_prefix_caching=False, **PATHS[path]) as engine:
        for name in ("all-linear", "regex", "some-layers"):
            engine.register_adapter(name, tiny.adapters[name])
        steps = Steps(engine)
        for name in ("all-linear", "regex", "all-linear", "some-layers"):
            before = await engine.complete(PROMPT, greedy(12))
            await merge(engine, policy, name)
            steps.taken()
            found = await engine.complete(PROMPT, greedy(12), adapter=name)
            assert all(merged for _, merged in steps.taken())
            assert found.token_ids == merged_by_peft(tiny.model, tiny.adapters[name], 12)
            # The base model beside and after it: the very bits that it had before.
            after = await engine.complete(PROMPT, greedy(12))
            assert after.token_ids == before.token_ids
            assert not any(merged for _, merged in steps.taken())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.slow
async def test_others_run_beside_it_with_their_own_weights(
    path: str, tiny: Tiny, make_engine: MakeEngine
) -> None:
    policy = Merge()
    names = ["rank-3", "qv-only", None]
    logprobs = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=1)
    async with make_engine(
        tiny, policy, merge=True, max_loras=2, max_cpu_loras=4, enable_prefix_caching=False, **PATHS[path]
    ) as engine:
        for name in ("rank-3", "qv-only"):
            engine.register_adapter(name, tiny.adapters[name])
        alone = {name: await engine.complete(PROMPT, logprobs, adapter=name) for name in names}
        await merge(engine, policy, "rank-3")
        steps = Steps(engine)
        together = await asyncio.gather(
            *(engine.complete(PROMPT, logprobs, adapter=name) for name in names for _ in range(2))
        )
        for name, output in zip([name for name in names for _ in range(2)], together, strict=True):
            assert output.token_ids == alone[name].token_ids
        kinds = set(steps.taken())
        assert all(count == 1 for count, merged in kinds if merged)
        assert {merged for _, merged in kinds} >= {False}
        again = await engine.complete(PROMPT, logprobs)
        assert again.logprobs == alone[None].logprobs, "the same bits"
        engine.check_invariants()


async def test_scores_and_vectors_of_a_merged_adapter(tiny: Tiny, make_engine: MakeEngine) -> None:
    policy = Merge()
    scored = SamplingParams(max_tokens=1, prompt_logprobs=1)
    async with make_engine(tiny, policy, merge=True, block_size=16, enable_prefix_caching=False) as engine:
        engine.register_adapter("rank-3", tiny.adapters["rank-3"])
        score = await engine.complete(PROMPT, scored, adapter="rank-3")
        vector = await engine.embed(PROMPT, adapter="rank-3")
        await merge(engine, policy, "rank-3")
        steps = Steps(engine)
        score_merged = await engine.complete(PROMPT, scored, adapter="rank-3")
        vector_merged = await engine.embed(PROMPT, adapter="rank-3")
        assert all(merged for _, merged in steps.taken())
        assert vector_merged.vector == pytest.approx(vector.vector, abs=1e-4)
        found, expected = (
            [entry.logprob for entry in output.prompt_logprobs or () if entry is not None]
            for output in (score_merged, score)
        )
        assert found == pytest.approx(expected, abs=1e-4) and len(found) == len(PROMPT) - 1


async def test_what_does_more_than_add_to_linears_of_layers_is_not_merged(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    model = build_model(tmp_path / "model", "llama")
    adapters = {
        "dora": build_adapter(model, tmp_path / "dora", use_dora=True),
        "head": build_adapter(model, tmp_path / "head", target_modules=["q_proj", "lm_head"]),
        "tokens": build_trained(model, tmp_path / "tokens", trainable_token_indices=[5, 6]),
        "activated": build_adapter(model, tmp_path / "activated", alora_invocation_tokens=[7, 8]),
        "plain": build_adapter(model, tmp_path / "plain"),
    }
    policy = Merge()
    refusals: list[tuple[str, str]] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.PolicyRefused):
            refusals.append((event.reason, event.item))

    fields: dict[str, Any] = {
        "merge": True,
        "max_loras": 5,
        "max_cpu_loras": 5,
        "max_trained_tokens": 4,
        "target_modules": [*LoRAConfig().modules, "lm_head"],
    }
    async with make_engine(Tiny(model, adapters), policy, **fields) as engine:
        engine.add_listener(listen)
        for name, folder in adapters.items():
            engine.register_adapter(name, folder)
            await engine.complete(PROMPT, greedy(2), adapter=name)
            policy.name = name
            await engine.complete(PROMPT, greedy(2), adapter=name)
        await until(lambda: engine.stats().merged == "plain")
    assert set(refusals) == {("merge_not_exact", name) for name in adapters if name != "plain"}


async def test_an_adapter_that_fails_to_merge_is_served_without(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> float:
        raise MemoryError("planned")

    monkeypatch.setattr(MergedDecoder, "merge", broken)
    policy = Merge()
    async with make_engine(tiny, policy, merge=True) as engine:
        engine.register_adapter("rank-3", tiny.adapters["rank-3"])
        policy.name = "rank-3"
        await engine.complete(PROMPT, greedy(2), adapter="rank-3")
        await until(lambda: "could not be merged" in caplog.text)
        found = await engine.complete(PROMPT, greedy(6), adapter="rank-3")
        assert found.token_ids == tiny.expected(PROMPT, 6, "rank-3")
        assert engine.stats().merged is None


async def test_steps_and_copies_go_on_while_an_adapter_is_merged_and_a_stop_does_not_wait_for_its_end(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge is held up until the engine stops."""
    entered, leave = threading.Event(), threading.Event()
    add = MergedDecoder._add
    close = MergedDecoder.close

    def held(self: MergedDecoder, *args: Any) -> None:
        entered.set()
        assert leave.wait(60)
        add(self, *args)

    def closed(self: MergedDecoder) -> None:
        close(self)
        leave.set()

    monkeypatch.setattr(MergedDecoder, "_add", held)
    monkeypatch.setattr(MergedDecoder, "close", closed)
    policy = Merge()
    async with make_engine(tiny, policy, merge=True, max_loras=2, max_cpu_loras=4) as engine:
        for name in ("rank-3", "qv-only", "rank-4"):
            engine.register_adapter(name, tiny.adapters[name])
        policy.name = "rank-3"
        await engine.complete(PROMPT, greedy(2), adapter="rank-3")
        await until(entered.is_set)
        for name in ("qv-only", "rank-4", "rank-3", None):  # one of them has to be copied into a slot
            found = await engine.complete(PROMPT, greedy(4), adapter=name)
            assert found.token_ids == tiny.expected(PROMPT, 4, name)
        assert not leave.is_set() and engine.stats().merged is None
    assert leave.is_set()


async def test_a_new_version_of_a_merged_adapter(tiny: Tiny, make_engine: MakeEngine) -> None:
    policy = Merge()
    async with make_engine(tiny, policy, merge=True, block_size=16) as engine:
        await engine.load_adapter("policy", tiny.adapters["rank-3"])
        await merge(engine, policy, "policy")
        policy.name = None
        await engine.load_adapter("policy", tiny.adapters["rank-4"], replace=True)
        found = await engine.complete(PROMPT, greedy(6), adapter="policy")
        assert found.token_ids == tiny.expected(PROMPT, 6, "rank-4")
        assert engine.stats().merged is None
        await merge(engine, policy, "policy")
        found = await engine.complete(PROMPT, greedy(6), adapter="policy")
        assert found.token_ids == tiny.expected(PROMPT, 6, "rank-4")


async def test_files_that_changed_in_place_are_not_served_as_they_were(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Neither by merged weights, nor by what these have left in the prefix cache."""
    policy = Merge()
    live = tmp_path / "live"
    shutil.copytree(tiny.adapters["rank-3"], live)
    async with make_engine(tiny, policy, merge=True, max_loras=1, max_cpu_loras=1) as engine:
        engine.register_adapter("live", live)
        engine.register_adapter("rank-4", tiny.adapters["rank-4"])
        await merge(engine, policy, "live")
        policy.name = None
        await engine.complete(PROMPT[:3], greedy(2), adapter="rank-4")  # the other leaves the CPU cache
        shutil.rmtree(live)
        shutil.copytree(tiny.adapters["rank-4"], live)
        for name in ("live", "rank-4"):
            found = await engine.complete(PROMPT, greedy(6), adapter=name)
            assert found.token_ids == tiny.expected(PROMPT, 6, "rank-4")
        assert engine.stats().merged is None
        await merge(engine, policy, "live")
        found = await engine.complete(PROMPT, greedy(6), adapter="live")
        assert found.token_ids == tiny.expected(PROMPT, 6, "rank-4")
        engine.check_invariants()


async def test_metrics_and_the_builtin_policy(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny, load_policy("dlora:alone=0"), merge=True, block_size=16) as engine:
        engine.register_adapter("rank-3", tiny.adapters["rank-3"])
        steps = Steps(engine)
        while engine.stats().merged is None:
            await engine.complete(PROMPT, greedy(20), adapter="rank-3")
        await engine.complete(PROMPT, greedy(20), adapter="rank-3")
        value, here = engine.metrics.registry.get_sample_value, {"engine": "default"}
        assert value("aioengine_lora_merged", {**here, "adapter": "rank-3"}) == 1
        assert value("aioengine_lora_merge_seconds_count", here) == 1
        steps_counted = value("aioengine_lora_merged_steps_total", here)
    count = sum(merged for _, merged in steps.taken())
    assert count >= 20
    assert steps_counted == count


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_invariant": True},
        {"speculation": "ngram"},
        {"quantization": "int8"},
        {"executor": "process"},
        {"device": "cuda"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_settings_that_do_not_go_together_are_refused_by_name(fields: dict[str, Any]) -> None:
    [name] = fields
    with pytest.raises(ConfigError, match=rf"lora\.merge=True with {name}=.*set {name}="):
        EngineConfig(model="any", lora=LoRAConfig(merge=True), **fields)


async def test_models_that_cannot_merge_are_refused_at_the_start(tiny: Tiny, make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"lora\.merge=True: transformers runs this model"):
        await make_engine(tiny, merge=True, model_impl="transformers").start()
    with pytest.raises(ConfigError, match=r"lora\.merge=True: no linear of a layer"):
        await make_engine(tiny, merge=True, target_modules=["lm_head"]).start()


async def test_it_is_off_by_default_and_says_so(tiny: Tiny, make_engine: MakeEngine) -> None:
    for wanted in (False, True):
        async with make_engine(tiny, block_size=16, merge=wanted) as engine:
            assert engine.info.batch_invariant == (not wanted)


def test_the_plan_has_a_row_for_it(tiny: Tiny) -> None:
    plain, merges = (
        plan_from_config(
            EngineConfig(model=str(tiny.model), kv_cache_memory="2MiB", lora=LoRAConfig(merge=merge, **more))
        )
        for merge, more in ((False, {}), (True, {}))
    )
    hidden, inner, kv = 64, 96, 32
    numbers = 3 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    assert merges.merged_bytes == 4 * numbers
    assert merges.total_bytes == plain.total_bytes + 4 * numbers
    assert [name for name, _, _ in merges.rows() if name == "merged weights"]
    assert not [name for name, _, _ in plain.rows() if name == "merged weights"]
