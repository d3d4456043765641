"""/v1/models, adapters over HTTP, tokens, probes, pages."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from support.engine_fixtures import Tiny, greedy
from support.machine import slowness
from support.server_fixtures import MODEL, Serve

from aioengine import FilesystemResolver
from aioengine.cli.flags import in_flags


async def test_the_base_model_and_the_adapters_are_models(serve: Serve, tiny_text: Tiny) -> None:
    async with serve(settings={"served_model_names": ["org/tiny", "tiny"]}) as served:
        models = {model.id: model async for model in await served.client.models.list()}
        assert list(models) == ["org/tiny", "tiny", "a"]
        base, adapter = models["org/tiny"].model_dump(), models["a"].model_dump()
        assert (base["parent"], base["root"]) == (None, "org/tiny")
        assert (adapter["parent"], adapter["root"]) == ("org/tiny", "a")
        assert base["max_model_len"] == 128
        assert (await served.client.models.retrieve("a")).model_dump() == adapter
        assert (await served.client.models.retrieve("org/tiny")).model_dump() == base
        with pytest.raises(openai.NotFoundError):
            await served.client.models.retrieve("b")
        for name in ("org/tiny", "tiny"):
            assert (
                await served.client.completions.create(model=name, prompt="x", max_tokens=1)
            ).model == name


@pytest.fixture
def root(tiny_text: Tiny, tmp_path: Path) -> Path:
    """An adapter root with "team/a", and beside it, outside, "secret"."""
    shutil.copytree(tiny_text.adapters["a"], tmp_path / "root" / "team" / "a")
    shutil.copytree(tiny_text.adapters["a"], tmp_path / "secret")
    return tmp_path / "root"


async def test_adapters_are_loaded_and_unloaded_as_vllm_does(serve: Serve, root: Path) -> None:
    async with serve(adapter_root=str(root)) as served:

        async def post(path: str, **body: Any) -> tuple[int, str]:
            answer = await served.http.post(path, json=body)
            return answer.status_code, answer.text

        expected = await served.engine.complete("Hello", greedy(8), adapter="a")
        loaded = await post("/v1/load_lora_adapter", lora_name="new", lora_path="team/a")
        assert loaded == (200, "Success: LoRA adapter 'new' added successfully.")
        answer = await served.client.completions.create(
            model="new", prompt="Hello", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].text == expected.text

        status, text = await post("/v1/load_lora_adapter", lora_name="new", lora_path="team/a")
        assert (status, "has already been loaded" in text) == (400, True)
        again = {"lora_name": "new", "lora_path": str(root / "team" / "a"), "load_inplace": True}
        assert (await post("/v1/load_lora_adapter", **again))[0] == 200
        assert [info.version for info in served.engine.adapters() if info.name == "new"] == [2]

        assert (await post("/v1/load_lora_adapter", lora_name="same", lora_path="./team/a/"))[0] == 200

        unloaded = await post("/v1/unload_lora_adapter", lora_name="new")
        assert unloaded == (200, "Success: LoRA adapter 'new' removed successfully.")
        status, text = await post("/v1/unload_lora_adapter", lora_name="new")
        assert (status, "cannot be found" in text) == (404, True)
        assert (await post("/v1/load_lora_adapter", lora_name="new"))[0] == 400
        assert (await post("/v1/load_lora_adapter", lora_name=MODEL, lora_path="team/a"))[0] == 400
        assert (await post("/v1/load_lora_adapter", lora_name="bad name", lora_path="team/a"))[0] == 400
        bad = await post("/v1/load_lora_adapter", lora_name="bad name", lora_path="team/a")
        assert '"param":"lora_name"' in bad[1]


@pytest.mark.slow
async def test_a_refusal_names_what_whoever_serves_can_change(
    serve: Serve, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those who embed the engine have fields, and those who run ``aioengine serve`` have flags."""
    for reword, name in ((None, "LoRAConfig.max_lora_rank"), (in_flags, "--max-lora-rank")):
        async with serve(settings={"reword": reword}, adapter_root=str(root), max_lora_rank=2) as served:
            body = {"model": "team/a", "prompt": "x", "max_tokens": 2}
            answers = [await served.http.post("/v1/completions", json=body) for _ in range(3)]
            load = {"lora_name": "other", "lora_path": "team/a"}
            answers.append(await served.http.post("/v1/load_lora_adapter", json=load))
            for answer in answers:
                assert answer.status_code == 400
                assert f"raise {name} or" in answer.json()["error"]["message"]
        said = [text for record in caplog.records if "not loaded" in (text := record.getMessage())]
        assert ["team/a" in text and "max_lora_rank" in text for text in said] == [True] * 3
        assert [text.endswith("(failed 2 times)") for text in said] == [False, True, False]
        caplog.clear()


async def test_two_that_load_one_name_do_not_learn_each_others_path(
    serve: Serve, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root / "team" / "a", root / "team" / "b")
    both, find = threading.Barrier(2, timeout=60), FilesystemResolver.find
    monkeypatch.setattr(FilesystemResolver, "find", lambda self, name: (both.wait(), find(self, name))[1])
    async with serve(adapter_root=str(root)) as served:
        loads = [{"lora_name": "new", "lora_path": f"team/{name}"} for name in "ab"]
        asked = [served.http.post("/v1/load_lora_adapter", json=load) for load in loads]
        answers = sorted(await asyncio.gather(*asked), key=lambda answer: answer.status_code)
        assert [answer.status_code for answer in answers] == [200, 400]
        assert "'new'" in answers[1].text and "root" not in answers[1].text


async def test_names_have_a_bound(serve: Serve, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioengine.server.openai.adapters.MAX_ADAPTERS", 3)
    async with serve(adapter_root=str(root)) as served:  # "a" is one of them

        async def load(name: str) -> tuple[int, str]:
            body = {"lora_name": name, "lora_path": "team/a", "load_inplace": name == "n0"}
            answer = await served.http.post("/v1/load_lora_adapter", json=body)
            return answer.status_code, answer.text

        assert [(await load(f"n{i}"))[0] for i in range(3)] == [200, 200, 400]
        assert "too_many_adapters" in (await load("n2"))[1]
        assert (await load("n0"))[0] == 200  # replaced
        await served.http.post("/v1/unload_lora_adapter", json={"lora_name": "n1"})
        assert (await load("n2"))[0] == 200


async def test_nothing_outside_of_the_root_is_loaded(serve: Serve, root: Path) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    (root / "inner").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "inner" / name).symlink_to(root.parent / "secret" / name)
    async with serve(adapter_root=str(root)) as served:
        outside = [
            "../secret",
            str(root.parent / "secret"),
            "team/../../secret",
            "link",
            "inner",
            "/",
            ".",
            "~",
        ]
        outside += ["team/a\0", "hf:org/repo", "\\..\\secret", "nothing"]
        for path in outside:
            answer = await served.http.post(
                "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": path}
            )
            assert (answer.status_code, path) == (404, path)
            assert str(root) not in answer.text or path.startswith("/")
        assert [info.name for info in served.engine.adapters()] == ["a"]


async def test_without_a_root_there_is_no_loading(serve: Serve, tiny_text: Tiny) -> None:
    async with serve() as served:
        body = {"lora_name": "x", "lora_path": str(tiny_text.adapters["a"])}
        assert (await served.http.post("/v1/load_lora_adapter", json=body)).status_code == 403
        assert (await served.http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})).status_code == 403
        assert [info.name for info in served.engine.adapters()] == ["a"]


async def test_tokenize_and_back(serve: Serve) -> None:
    async with serve() as served:

        async def post(path: str, **body: Any) -> Any:
            return (await served.http.post(path, json=body)).json()

        text = "héllo, 世界"
        found = await post("/tokenize", model=MODEL, prompt=text)
        assert found["count"] == len(found["tokens"]) == len(text.encode())
        assert found["max_model_len"] == 128
        assert (await post("/detokenize", model="a", tokens=found["tokens"]))["prompt"] == text
        chat = await post("/tokenize", messages=[{"role": "user", "content": "Hi"}])
        assert (await post("/detokenize", tokens=chat["tokens"]))["prompt"] == "<user>Hi"
        for unknown in (served.engine.tokenizer.vocab_size, 2**31 - 1):
            error = (await post("/detokenize", tokens=[*found["tokens"], unknown, unknown]))["error"]
            assert (error["param"], error["code"]) == ("tokens", "invalid_value")
            assert error["message"].startswith(f"tokens[{found['count']}]={unknown}: ")
        both = await post("/tokenize", prompt="x", messages=[{"role": "user", "content": "Hi"}])
        assert both["error"]["param"] == "prompt"


async def test_the_description_has_both_forms_of_an_answer(serve: Serve) -> None:
    async with serve() as served:
        schema = (await served.http.get("/docs/openapi.json")).json()
        post = schema["paths"]["/v1/chat/completions"]["post"]
        assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        assert schema["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False


async def test_the_description_is_not_made_on_the_event_loop(serve: Serve) -> None:
    """It takes a third of a second of processor time, and the loop runs in this thread."""
    async with serve() as served:
        await served.http.get("/version")
        began = time.thread_time()
        answers = await asyncio.gather(*(served.http.get("/docs/openapi.json") for _ in range(3)))
        assert time.thread_time() - began < 0.15 * slowness()
        assert len({answer.content for answer in answers}) == 1 and "paths" in answers[0].json()
