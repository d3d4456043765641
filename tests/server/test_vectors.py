"""Vectors, labels and scores over HTTP, as OpenAI's client and others ask for them."""

from __future__ import annotations

import asyncio
import base64
import struct
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support.engine_fixtures import Tiny
from support.held_steps import HeldStep
from support.server_fixtures import MODEL, Serve, Served
from support.waiting import until

from aioengine import SamplingParams

TEXTS = ["one", "two words", "a third text"]


@pytest.fixture(scope="module")
def heads(tiny_text: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Random adapters with a head, by number of labels."""
    found = {}
    for labels in (1, 2):
        folder = tmp_path_factory.mktemp(f"head-{labels}")
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            tiny_text.model, dtype=torch.float32, num_labels=labels
        )
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        peft.get_peft_model(base, config).save_pretrained(str(folder))
        found[labels] = folder
    return found


async def answer(served: Served, path: str, **body: Any) -> tuple[int, Any]:
    found = await served.http.post(path, json={"model": MODEL, **body})
    return found.status_code, found.json()


async def test_embeddings_as_openai_asks_for_them(serve: Serve) -> None:
    async with serve() as served:
        engine = served.engine
        expected = [(await engine.embed(text)).vector for text in TEXTS]
        made = await served.client.embeddings.create(model=MODEL, input=TEXTS)  # base64 by itself
        for item, vector in zip(made.data, expected, strict=True):
            assert item.embedding == pytest.approx(vector, abs=1e-6)
        assert [item.index for item in made.data] == [0, 1, 2]
        assert made.usage.prompt_tokens == made.usage.total_tokens == sum(map(len, TEXTS))
        floats = await served.client.embeddings.create(
            model="a", input=TEXTS[0], encoding_format="float", dimensions=5
        )
        of_adapter = (await engine.embed(TEXTS[0], "a", dimensions=5)).vector
        assert floats.data[0].embedding == pytest.approx(of_adapter, abs=1e-6)
        for ids in ([1, 2, 3], [[1, 2, 3]]):
            status, body = await answer(served, "/v1/embeddings", input=ids)
            vector = (await engine.embed([1, 2, 3])).vector
            assert (status, body["data"][0]["embedding"]) == (200, pytest.approx(vector, abs=1e-6))
        asked = {"input": "one", "pooling": "last", "normalize": False, "encoding_format": "base64"}
        status, body = await answer(served, "/v1/embeddings", **asked)
        raw = (await engine.embed("one", pooling="last", normalize=False)).vector
        data = base64.b64decode(body["data"][0]["embedding"])
        assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(raw, abs=1e-6)
        many = await served.client.embeddings.create(model=MODEL, input=[[1, 2]] * 300)
        assert len(many.data) == 300
        assert "version" in (await served.http.get("/version")).json()
        engine.check_invariants()


async def test_classify_and_rerank(serve: Serve, heads: dict[int, Path]) -> None:
    async with serve() as served:
        engine = served.engine
        for labels, folder in heads.items():
            engine.register_adapter(f"head-{labels}", folder)
        _, body = await answer(served, "/classify", model="head-2", input=TEXTS)
        for item, text in zip(body["data"], TEXTS, strict=True):
            found = await engine.classify(text, "head-2")
            assert (item["label"], item["num_classes"]) == (found.label, 2)
            assert item["probs"] == pytest.approx(found.probabilities, abs=1e-6)
        for model in ("head-1", "a", MODEL):
            adapter = None if model == MODEL else model
            expected = (await engine.score("query", TEXTS, adapter=adapter)).scores
            documents = [TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]]
            for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
                asked = {"query": "query", "documents": documents, "top_n": 2}
                _, body = await answer(served, path, model=model, **asked)
                best = sorted(range(3), key=lambda i: -expected[i])[:2]
                assert [item["index"] for item in body["results"]] == best
                scores = [item["relevance_score"] for item in body["results"]]
                assert scores == pytest.approx([expected[i] for i in best], abs=1e-5)
                assert [item["document"]["text"] for item in body["results"]] == [TEXTS[i] for i in best]
        engine.check_invariants()


async def test_refused(serve: Serve, heads: dict[int, Path]) -> None:
    async with serve() as served:
        served.engine.register_adapter("one", heads[1])
        served.engine.register_adapter("two", heads[2])
        many = {"query": "q" * 1100, "documents": ["d"] * 2048, "model": "one"}
        for path, fields, status, words in [
            ("/v1/embeddings", {"input": []}, 400, "input: must be a text"),
            ("/v1/embeddings", {"input": [1, "a"]}, 400, "input: must be a text"),
            ("/v1/embeddings", {"input": ["a"] * 5000}, 400, "at most 2048"),
            ("/v1/embeddings", {"input": "x" * 200}, 400, "maximum context length"),
            ("/v1/embeddings", {"input": "x", "dimensions": 65}, 400, "dimensions"),
            ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, 400, "encoding_format"),
            ("/v1/embeddings", {"input": "x", "model": "nobody"}, 404, "nobody"),
            ("/v1/embeddings", {"input": [999]}, 400, "vocabulary"),
            ("/v1/embeddings", {"input": "x", "pooling": "max"}, 400, "pooling"),
            ("/classify", {"input": "x"}, 400, "no trained classification head"),
            ("/classify", {"input": "x", "model": "a"}, 400, "no trained classification head"),
            ("/rerank", {"query": "a", "documents": ["b"], "model": "two"}, 400, "its head has 2 labels"),
            ("/rerank", {"query": "a", "documents": []}, 400, "documents"),
            ("/rerank", many, 400, "send fewer documents"),
            ("/rerank", {"query": "a", "documents": ["b"], "model": "nobody"}, 404, "nobody"),
        ]:
            found, body = await answer(served, path, **fields)
            assert (found, words in body["error"]["message"]) == (status, True), body
        served.engine.check_invariants()


async def test_a_replaced_version_has_its_own_labels(serve: Serve, heads: dict[int, Path]) -> None:
    """It lives as long as a request runs on it."""
    async with serve() as served:
        engine, held = served.engine, HeldStep()
        engine.register_adapter("h", heads[1])
        params = SamplingParams(max_tokens=3, constraint=held)
        running = asyncio.create_task(engine.complete("x", params, adapter="h"))
        await until(held.begun.is_set)
        await engine.prepare_adapter("h", heads[2], read=False)
        engine.commit_adapter("h")
        score = {"query": "query", "documents": TEXTS}
        scored = asyncio.create_task(answer(served, "/rerank", model="h@1", **score))
        await until(lambda: engine.stats().waiting > 0 or scored.done())
        held.go_on.set()
        assert (await scored)[0] == 200
        status, body = await answer(served, "/rerank", model="h", **score)
        assert status == 400 and "its head has 2 labels" in body["error"]["message"]
        await running
        engine.check_invariants()
