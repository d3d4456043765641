"""Vectors, labels and scores, against transformers and peft."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.mixed_adapters import scaled_model
from support.peft_files import edit_config, edit_weights
from support.tiny_models import ALL_MODULES

from aioengine import AsyncEngine, SamplingParams
from aioengine.errors import AdapterInvalid, AdapterNotFound, AioEngineError, RequestInvalid

PROMPTS = [prompt_of(i, length) for i, length in enumerate((1, 5, 9, 30))]


class Trained(NamedTuple):
    folder: Path
    model: Any
    """PEFT's, in evaluation mode."""

    def logits(self, prompt: list[int]) -> list[float]:
        with torch.no_grad():
            found: list[float] = self.model(torch.tensor([prompt])).logits[0].tolist()
        return found

    def states(self, prompt: list[int]) -> torch.Tensor:
        """[tokens, hidden]"""
        with torch.no_grad():
            found: torch.Tensor = self.model(torch.tensor([prompt])).last_hidden_state[0]
        return found


def train(tiny: Tiny, folder: Path, auto: Any, **options: Any) -> Trained:
    """A random adapter of every linear, and of the head, if the task has one."""
    task = "SEQ_CLS" if options else "FEATURE_EXTRACTION"
    base = auto.from_pretrained(tiny.model, dtype=torch.float32, pad_token_id=2, **options)
    config = peft.LoraConfig(r=4, target_modules=ALL_MODULES, task_type=task)
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(len(str(options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return Trained(folder, model.eval())


@pytest.fixture(scope="module")
def heads(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    """By number of labels."""
    root, auto = tmp_path_factory.mktemp("heads"), transformers.AutoModelForSequenceClassification
    return {labels: train(tiny, root / str(labels), auto, num_labels=labels) for labels in (1, 3)}


@pytest.fixture(scope="module")
def embedder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("embedder")
    trained = train(tiny, folder, transformers.AutoModel)
    assert any(
        key.startswith("base_model.model.layers.") for key in load_file(folder / "adapter_model.safetensors")
    )
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))
    return trained


def close(ours: list[float], theirs: Any) -> None:
    assert ours == pytest.approx(torch.as_tensor(theirs).tolist(), rel=1e-4, abs=2e-5)


async def test_classify_among_others(tiny: Tiny, make_engine: MakeEngine, heads: dict[int, Trained]) -> None:
    async with make_engine(tiny, max_num_batched_tokens=16) as engine:
        for labels, trained in heads.items():
            engine.register_adapter(f"head-{labels}", trained.folder)
        engine.register_adapter("chat", tiny.adapters["rank-3"])
        work = [(prompt, labels) for prompt in PROMPTS for labels in heads]
        found, chat = await asyncio.gather(
            asyncio.gather(*(engine.classify(prompt, f"head-{labels}") for prompt, labels in work)),
            engine.complete(PROMPTS[1], greedy(12), adapter="chat"),
        )
        assert chat.token_ids == tiny.expected(PROMPTS[1], 12, "rank-3")
        for (prompt, labels), result in zip(work, found, strict=True):
            logits = torch.tensor(heads[labels].logits(prompt))
            close(result.logits, logits)
            close(result.probabilities, logits.softmax(0) if labels > 1 else logits.sigmoid())
            assert result.label == f"LABEL_{int(logits.argmax())}"
            assert (result.prompt_tokens, result.adapter) == (len(prompt), f"head-{labels}")
        infos = {info.name: info.labels for info in engine.adapters()}
        assert infos == {"head-1": 1, "head-3": 3, "chat": 0}
        stats = engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks  # nothing is kept, and nothing is in the prefix cache
        again = await engine.complete(PROMPTS[3], SamplingParams(max_tokens=0, pooling="last"))
        assert again.cached_tokens == 0 and again.finish_reason == "length"
        engine.check_invariants()


async def test_embed(tiny: Tiny, make_engine: MakeEngine, embedder: Trained) -> None:
    base = transformers.AutoModel.from_pretrained(tiny.model, dtype=torch.float32)
    async with make_engine(tiny, max_num_batched_tokens=16) as engine:
        engine.register_adapter("e", embedder.folder)
        for prompt in PROMPTS:
            states = embedder.states(prompt)
            pooled = {"mean": states.mean(0), "last": states[-1], "cls": states[0], None: states[-1]}
            for kind, vector in pooled.items():
                raw = await engine.embed(prompt, "e", pooling=kind, normalize=False)
                close(raw.vector, vector)
                unit = await engine.embed(prompt, adapter="e", pooling=kind, dimensions=10)
                close(unit.vector, torch.nn.functional.normalize(vector[:10], dim=0))
            with torch.no_grad():
                mean = base(torch.tensor([prompt])).last_hidden_state[0].mean(0)
            close((await engine.embed(prompt, normalize=False)).vector, mean)
        engine.check_invariants()


async def test_score(
    tiny_text: Tiny, make_engine: MakeEngine, heads: dict[int, Trained], embedder: Trained
) -> None:
    documents = ["one", "two words", "a third"]
    async with make_engine(tiny_text) as engine:
        engine.register_adapter("cross", heads[1].folder)
        engine.register_adapter("three", heads[3].folder)
        await engine.load_adapter("e", embedder.folder)
        scores = await engine.score("query", documents, adapter="cross")
        for document, found in zip(documents, scores.scores, strict=True):
            assert engine.tokenizer is not None
            ids = engine.tokenizer.encode("query" + document)
            logits = (await engine.classify(ids, "cross")).logits
            assert found == pytest.approx(torch.sigmoid(torch.tensor(logits[0])).item(), abs=1e-6)
        assert scores.prompt_tokens == sum(len("query" + document) for document in documents)
        by_cosine = await engine.score("query", documents, adapter="e")
        query, *others = [(await engine.embed(text, "e")).vector for text in ("query", *documents)]
        cosines = [sum(a * b for a, b in zip(query, other, strict=True)) for other in others]
        assert by_cosine.scores == pytest.approx(cosines, abs=1e-5)
        with pytest.raises(RequestInvalid, match="head has 3 labels"):
            await engine.score("query", documents, adapter="three")
        for query_, texts, words in [
            ("q", [], "at least one"),
            ("q", "text", "expected a list"),
            ("q", ["a"] * 1025, "more than 1024"),
            ("q", [3], "expected texts or lists"),
            ([1], ["a"], "give only texts"),
        ]:
            with pytest.raises(RequestInvalid, match=words):
                await engine.score(query_, texts, adapter="cross")  # type: ignore[arg-type]
        with pytest.raises(AdapterNotFound):
            await engine.score("q", ["a"], adapter="nobody")
        assert not engine.stats().running + engine.stats().waiting
        engine.check_invariants()


async def test_scaled(tiny: Tiny, make_engine: MakeEngine, heads: dict[int, Trained]) -> None:
    """A head stays as it is when its adapter is scaled, as in PEFT."""
    auto = transformers.AutoModelForSequenceClassification
    async with make_engine(tiny) as engine:
        for labels, head in heads.items():
            name = f"h{labels}"
            engine.register_adapter(name, head.folder)
            options = {"num_labels": labels, "pad_token_id": 2}
            scaled = Trained(head.folder, scaled_model(tiny.model, {head.folder: 0.5}, auto, **options))
            close((await engine.classify(PROMPTS[2], {name: 0.5})).logits, scaled.logits(PROMPTS[2]))
        [score] = (await engine.score(PROMPTS[1], [PROMPTS[0]], {"h1": 1.0})).scores
        assert score == pytest.approx((await engine.score(PROMPTS[1], [PROMPTS[0]], "h1")).scores[0])
        with pytest.raises(AdapterInvalid, match="a classification head"):
            await engine.classify(PROMPTS[0], {"h1": 0.5, "h3": 0.5})
        engine.check_invariants()


async def test_preempted_in_the_middle(
    tiny: Tiny, make_engine: MakeEngine, heads: dict[int, Trained]
) -> None:
    """Prompts in pieces that lose their blocks to others and begin again."""
    async with make_engine(
        tiny, kv_cache_memory="60KiB", max_num_batched_tokens=8, max_num_seqs=8, max_model_len=64
    ) as engine:
        engine.register_adapter("h", heads[3].folder)
        prompts = [prompt_of(i, 40) for i in range(4)]
        await engine.load_adapter("h")
        chats = [asyncio.ensure_future(engine.complete(prompt_of(i, 20), greedy(40))) for i in range(2)]
        runs = [engine.embed(prompt, "h", pooling="mean", normalize=False) for prompt in prompts]
        found = await asyncio.gather(*runs)
        await asyncio.gather(*chats)
        for prompt, result in zip(prompts, found, strict=True):
            states = heads[3].model.base_model.model.model(torch.tensor([prompt])).last_hidden_state[0]
            close(result.vector, states.mean(0).detach())
        assert engine.stats().preemptions > 0
        engine.check_invariants()


async def refused(engine: AsyncEngine, run: Any, kind: type[AioEngineError], words: str) -> None:
    with pytest.raises(kind, match=words):
        await run
    engine.check_invariants()


async def test_refused(tiny: Tiny, make_engine: MakeEngine, embedder: Trained) -> None:
    async with make_engine(tiny) as engine:
        engine.register_adapter("e", embedder.folder)
        no_head = "no trained classification head"
        await refused(engine, engine.classify([1, 2]), RequestInvalid, no_head)
        await refused(engine, engine.classify([1, 2], "e"), RequestInvalid, no_head)
        wrong: Any = "max"
        await refused(engine, engine.embed([1], pooling=wrong), RequestInvalid, "allowed are auto, mean")
        for dimensions in (0, 65, True):
            await refused(engine, engine.embed([1], dimensions=dimensions), RequestInvalid, "dimensions")
        await refused(engine, engine.embed([]), RequestInvalid, "empty")
        await refused(engine, engine.embed([999]), RequestInvalid, "vocabulary")
        await refused(engine, engine.embed([1], "nobody"), AdapterNotFound, "nobody")
    for fields in ({"max_tokens": 1}, {"max_tokens": 0, "prompt_logprobs": 0}):
        with pytest.raises(RequestInvalid, match="pooling needs max_tokens=0"):
            SamplingParams(pooling="mean", **fields)


WEIGHT, BIAS = (f"base_model.model.score.{kind}" for kind in ("weight", "bias"))


@pytest.mark.parametrize(
    ("weights", "config", "words"),
    [
        ({WEIGHT: None}, {}, "must have the weight of one of them; it has none"),
        ({WEIGHT: torch.zeros(3, 65)}, {}, "a head of 1 to 1024 labels over 64 hidden"),
        ({BIAS: torch.zeros(2)}, {}, "different numbers of labels"),
        (
            {WEIGHT.replace("score", "classifier"): torch.zeros(3, 64)},
            {},
            "must have the weight of one of them",
        ),
        ({}, {"modules_to_save": ["score", "lm_head"]}, "lm_head in modules_to_save, but the file has no w"),
        ({}, {"modules_to_save": None}, "unknown key"),
    ],
)
async def test_bad_heads(
    tiny: Tiny,
    make_engine: MakeEngine,
    heads: dict[int, Trained],
    tmp_path: Path,
    weights: dict[str, torch.Tensor | None],
    config: dict[str, Any],
    words: str,
) -> None:
    heads[3].model.save_pretrained(str(tmp_path))
    for key, weight in weights.items():
        edit_weights(tmp_path, lambda t: t.pop(key) if weight is None else t.update({key: weight}))  # noqa: B023
    edit_config(tmp_path, **config)
    async with make_engine(tiny) as engine:
        with pytest.raises(AdapterInvalid, match=words):
            await engine.load_adapter("x", tmp_path)


async def test_bad_pooling_configuration(
    tiny: Tiny, make_engine: MakeEngine, embedder: Trained, tmp_path: Path
) -> None:
    embedder.model.save_pretrained(str(tmp_path))
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    async with make_engine(tiny) as engine:
        deep = '{"a":' * 5000 + "1" + "}" * 5000
        wrong = (
            '{"pooling_mode_max_tokens": true}',
            "[]",
            "{}",
            '{"pooling_mode": "weightedmean"}',
            deep,
        )
        for text in wrong:
            file.write_text(text)
            with pytest.raises(AdapterInvalid, match=r"1_Pooling/config\.json"):
                await engine.load_adapter("x", tmp_path)
        file.write_text('{"pooling_mode": "cls"}')
        digest = (await engine.load_adapter("x", tmp_path)).digest
        file.write_text('{"pooling_mode":  "cls"}')
        assert (await engine.load_adapter("x", tmp_path, replace=True)).digest != digest
        raw = await engine.embed(PROMPTS[2], "x", normalize=False)
        close(raw.vector, embedder.states(PROMPTS[2])[0])
