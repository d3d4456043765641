"""Adapters with trained tokens against transformers + peft in float32, in mixed batches and under swaps."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, greedy, prompt_of, register
from support.peft_files import edit_weights
from support.tiny_models import build_model, reference_logits
from support.trained_tokens import build_trained

from aioengine import SamplingParams
from aioengine.errors import AdapterInvalid, AdapterTooLarge
from aioengine.kernels.dispatch import ENV

pytestmark = [
    pytest.mark.usefixtures("preloaded_workers"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ROWS = [5, 9, 40, 41, 100, 250]
BOTH: dict[str, dict[str, Any]] = {
    "listed": {"trainable_token_indices": [200, 7, 33, 120], "target_modules": ["q_proj"]},
    "both": {"trainable_token_indices": {"embed_tokens": [9, 4], "lm_head": [31, 4, 77]}},
    "head": {"trainable_token_indices": {"lm_head": [3, 60, 61, 62, 63, 64]}, "use_dora": True},
    "saved": {"modules_to_save": ["embed_tokens"], "rows": ROWS},
    "saved-head": {"modules_to_save": ["lm_head"], "rows": ROWS, "lora_bias": True},
    "saved-both": {"modules_to_save": ["embed_tokens", "lm_head"], "rows": ROWS, "r": 7},
    "saved-alike": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "rows": ROWS},
    "plain": {},
}
PATHS: dict[str, dict[str, Any]] = {
    "torch": {"max_trained_tokens": 12},
    "portable": {"max_trained_tokens": 12, "max_num_batched_tokens": 64},
    "compiled": {"block_size": 16, "max_trained_tokens": 12},
    "chunks": {"max_num_batched_tokens": 16, "max_num_seqs": 8, "max_trained_tokens": 12},
    "slots-by-bytes": {"slot_memory": "256KiB", "max_loras": 6, "max_cpu_loras": 8},
    "ranks": {"executor": "process", "tensor_parallel_size": 2, "max_trained_tokens": 12},
}


def build(root: Path, tied: bool) -> Tiny:
    model = build_model(root / "model", "llama", tie_word_embeddings=tied)
    adapters = {
        name: build_trained(model, root / name, seed=seed, **BOTH[name]) for seed, name in enumerate(BOTH)
    }
    return Tiny(model, adapters)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("trained"), request.param)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "ranks"])
@pytest.mark.slow
async def test_tokens_are_those_of_peft(
    path: str, trained: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "portable":
        monkeypatch.setenv(ENV, "torch")
    await check(path, trained, make_engine)


@pytest.mark.slow
async def test_ranks_share_them(tmp_path: Path, make_engine: MakeEngine) -> None:
    """Whole matrices are refused there, and everything else is the same."""
    trained = build(tmp_path, True)
    await check("ranks", trained, make_engine)


async def check(path: str, trained: Tiny, make_engine: MakeEngine) -> None:
    names = [name for name in BOTH if path != "ranks" or not name.startswith("saved")]
    # Every trained token is in some prompt.
    ids = [200, 7, 33, 120, 9, 4, 31, 77, 3, 60, 64, *ROWS]
    asked = [
        ([*prompt_of(i, 3 + 3 * i), *ids[i:], *ids[:i]], name) for i, name in enumerate([None, *names, None])
    ]
    async with make_engine(trained, **PATHS[path]) as engine:
        register(engine, trained, *names)
        for _ in range(2):  # then in other slots, and with the prefix cache
            await check_tokens(engine, trained, asked, 12)
        for name in set(BOTH) - set(names):
            with pytest.raises(AdapterInvalid, match="trainable_token_indices instead"):
                await engine.load_adapter(name, trained.adapters[name])
        stats = engine.stats()
        engine.check_invariants()
    assert stats.slot_loads > len(names) > len(stats.slots) or path == "slots-by-bytes"


async def test_the_rows_matter_and_so_do_their_logits(trained: Tiny, make_engine: MakeEngine) -> None:
    prompt = [*ROWS, 200, 7, 33, 120, 9, 4, 31, 77, 3, 60, 64]
    wanted = SamplingParams(max_tokens=1, logprobs=20, prompt_logprobs=20)
    async with make_engine(trained, block_size=16, max_trained_tokens=12) as engine:
        for name, folder in trained.adapters.items():
            await engine.load_adapter(name, folder)
            output = await engine.complete(prompt, wanted, adapter=name)
            table = reference_logits(trained.model, prompt, folder).log_softmax(-1)
            assert output.prompt_logprobs is not None and output.logprobs is not None
            entries = [*output.prompt_logprobs[1:], output.logprobs[0]]
            for row, entry in zip(table, entries, strict=True):
                assert entry is not None
                for token, value in entry.top:
                    assert value == pytest.approx(row[token].item(), abs=1e-4), name
    without = reference_logits(trained.model, prompt)
    assert (table - without.log_softmax(-1)).abs().max() > 0.1


async def test_company_changes_no_bit(trained: Tiny, make_engine: MakeEngine) -> None:
    """In float32 and with the compiled step: alone, beside others, sampled and scored later."""
    wanted = SamplingParams(max_tokens=10, logprobs=0, ignore_eos=True, temperature=1.0, seed=3)
    scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
    names = ["both", "head", None, "plain"]
    async with make_engine(
        trained, block_size=16, max_loras=4, max_cpu_loras=4, max_trained_tokens=12
    ) as engine:
        for name in names:
            if name is not None:
                await engine.load_adapter(name, trained.adapters[name])
        found = {}
        for company in (1, 9):
            runs = [
                engine.complete(prompt_of(i // 4, 9 + i), wanted, adapter=names[i % 4])
                for i in range(4 * company)
            ]
            outputs = await asyncio.gather(*runs)
            for name, prompt_index, output in zip(names, range(4), outputs, strict=False):
                assert output.logprobs is not None
                values = [entry.logprob for entry in output.logprobs]
                assert found.setdefault(name, (output.token_ids, values)) == (output.token_ids, values)
                whole = [*prompt_of(0, 9 + prompt_index), *output.token_ids]
                scored = await engine.complete(whole, scoring, adapter=name)
                assert scored.prompt_logprobs is not None
                assert [e.logprob for e in scored.prompt_logprobs[-10:] if e is not None] == values


async def test_int8_slots_keep_the_rows_exact(trained: Tiny, make_engine: MakeEngine) -> None:
    """A and B are rounded; the rows are not: with A and B of zero only they are left."""
    folder = trained.adapters["both"].parent / "rows-only"
    build_trained(trained.model, folder, trainable_token_indices={"lm_head": [31, 4], "embed_tokens": [9]})
    edit_weights(folder, lambda t: [tensor.zero_() for key, tensor in t.items() if "lora_B" in key])
    prompt = [9, 31, 4, *prompt_of(0, 8)]
    async with make_engine(trained, block_size=16, lora_dtype="int8", max_trained_tokens=4) as engine:
        await engine.load_adapter("rows", folder)
        output = await engine.complete(prompt, SamplingParams(max_tokens=1, logprobs=20), adapter="rows")
    table = reference_logits(trained.model, prompt, folder)[-1].log_softmax(-1)
    assert output.logprobs is not None
    for token, value in output.logprobs[0].top:
        assert value == pytest.approx(table[token].item(), abs=1e-4)


@pytest.mark.slow
async def test_rows_beyond_a_slot_take_two_places(trained: Tiny, make_engine: MakeEngine) -> None:
    """r=16 in all modules with DoRA leaves no room in a slot."""
    folder = trained.adapters["both"].parent / "full"
    build_trained(trained.model, folder, r=16, use_dora=True, trainable_token_indices={"lm_head": [1, 2, 3]})
    full = Tiny(trained.model, {"full": folder})
    for options in ({"max_loras": 2}, {"max_loras": 1, "max_trained_tokens": 3}):
        async with make_engine(full, **options) as engine:
            register(engine, full)
            await check_tokens(engine, full, [([1, 2, 3], "full")], 8)
    for options in ({"max_loras": 1}, {"slot_memory": "64KiB", "max_loras": 1}):
        async with make_engine(trained, **options) as engine:
            with pytest.raises(AdapterTooLarge, match="slot_memory"):
                await engine.load_adapter("full", folder)


@pytest.mark.slow
async def test_a_scale_keeps_them_and_a_mix_refuses_them(trained: Tiny, make_engine: MakeEngine) -> None:
    prompt = [*ROWS, 200, 7, 33, 120, 9, 4, 31, 77, 3, 60, 64]
    async with make_engine(trained, max_trained_tokens=12) as engine:
        register(engine, trained)
        await check_tokens(engine, trained, [(prompt, {name: 0.5}) for name in trained.adapters], 8)
        with pytest.raises(AdapterInvalid, match=r"trained tokens"):
            await engine.complete([1, 2], greedy(2), adapter={"both": 0.5, "plain": 0.5})
