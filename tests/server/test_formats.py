"""Families' tokenizers and chat templates: calls and reasoning over HTTP, marks being special tokens.

What the parsers make of each family's text is in ``test_tool_parser.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.byte_tokenizer import byte_tokenizer
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL, Served, served_by
from support.tiny_models import build_model

pytest.importorskip("llguidance")


class Family(NamedTuple):
    """What is its own: special tokens, of which the last ends an answer, added ones that are none, the
    template, and an answer with this reasoning, a text and a call."""

    special: tuple[str, ...]
    added: tuple[str, ...]
    template: str
    answer: str
    reasoning: str


TURNS = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.reasoning_content }}\n{% endfor %}"
SHOWN = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + TURNS
ARGUMENTS = '{"color": "red"}'
FAMILIES = {
    "qwen3": Family(
        ("<|im_start|>", "<|im_end|>"),
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
        SHOWN + "{# <tool_call></tool_call><think></think> #}{% if begin_thinking %}<think>\n{% endif %}",
        "<think>\nHm.\n</think>\n\nSo. "
        f'<tool_call>\n{{"name": "paint", "arguments": {ARGUMENTS}}}\n</tool_call>',
        "Hm.\n",
    ),
    "gpt-oss": Family(
        ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
        (),
        SHOWN + "<|start|>assistant{# <|channel|> #}",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>So. "
        "<|end|><|start|>assistant<|channel|>commentary to=functions.paint <|constrain|>json<|message|>"
        f"{ARGUMENTS}",
        "Hm.",
    ),
}
PAINT = {
    "name": "paint",
    "parameters": {
        "type": "object",
        "properties": {"color": {"type": "string", "maxLength": 8}},
        "required": ["color"],
    },
}
TOOLS = [{"type": "function", "function": PAINT}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Models by family, made when they are first asked for."""
    made: dict[str, Tiny] = {}

    def build(name: str) -> Tiny:
        if name not in made:
            made[name] = Tiny(build_family(tmp_path_factory.mktemp(name), FAMILIES[name]), {})
        return made[name]

    return build


def build_family(folder: Path, family: Family) -> Path:
    """A tiny llama with a token for each byte, and the family's others."""
    others = [*family.added, *family.special]
    build_model(folder, "llama", vocab_size=256 + len(others), eos_token_id=255 + len(others))
    byte_tokenizer(family.added, family.special).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(family.template)
    return folder


def answering(name: str) -> dict[str, Any]:
    """Fields under which the model gives the family's answer, its marks as the tokens that they are."""
    family = FAMILIES[name]
    marks = (*family.added, *family.special)
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", family.answer)
    known = [
        f"<[{256 + marks.index(part)}]>" if part in marks else json.dumps(part) for part in parts if part
    ]
    return {"structured_outputs": {"grammar": f"start: {' '.join(known)}"}}


async def posted(served: Served, path: str, body: dict[str, Any]) -> Any:
    answer = await served.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def streamed(served: Served, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    async with served.http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [
            line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")
        ]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
async def test_an_answer_is_taken_apart(
    name: str, built: Callable[[str], Tiny], make_engine: MakeEngine
) -> None:
    family = FAMILIES[name]
    async with make_engine(built(name), max_model_len=500) as engine, served_by(engine) as served:
        body = {**CHAT, **answering(name), "tools": TOOLS, "return_token_ids": True}
        [choice] = (await posted(served, "/v1/chat/completions", body))["choices"]
        marks = [token for token in choice["token_ids"] if token >= 256]
        assert len(marks) > 1, "the marks are tokens of their own"
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("So. ", family.reasoning)
        [call] = message["tool_calls"]
        assert call["function"]["name"] == "paint"
        assert json.loads(call["function"]["arguments"]) == {"color": "red"}
        assert choice["finish_reason"] == "tool_calls"
        text = reasoning = ""
        calls = []
        for chunk in await streamed(served, "/v1/chat/completions", body):
            for part in chunk["choices"]:
                text += part["delta"].get("content") or ""
                reasoning += part["delta"].get("reasoning_content", "")
                calls += part["delta"].get("tool_calls", [])
        assert (text, reasoning, len(calls)) == ("So. ", family.reasoning, 1)
        assert calls[0]["function"] == call["function"]


@pytest.mark.slow
async def test_reasoning_that_the_prompt_begins(
    built: Callable[[str], Tiny], make_engine: MakeEngine
) -> None:
    """And what later prompts show of it."""
    async with make_engine(built("qwen3"), max_model_len=500) as engine, served_by(engine) as served:
        begun = {**CHAT, "chat_template_kwargs": {"begin_thinking": True}, "max_tokens": 9, "seed": 1}
        begun |= {"logit_bias": {str(token): -100 for token in range(256, 262)}}
        [choice] = (await posted(served, "/v1/chat/completions", begun))["choices"]
        assert not choice["message"]["content"] and choice["message"]["reasoning_content"]
        [choice] = (await posted(served, "/v1/chat/completions", {**begun, "chat_template_kwargs": None}))[
            "choices"
        ]
        assert choice["message"]["content"] and "reasoning_content" not in choice["message"]
        held = {**begun, "structured_outputs": {"choice": ["yes"]}}
        [choice] = (await posted(served, "/v1/chat/completions", held))["choices"]
        assert choice["message"]["content"] == "yes", "a constraint leaves no room for reasoning"
        turn = {"role": "assistant", "content": "so", "reasoning_content": "because"}
        tokens = (await posted(served, "/tokenize", {"messages": [turn]}))["tokens"]
        assert engine.tokenizer is not None and "because" in engine.tokenizer.decode(tokens)


@pytest.mark.parametrize("flag", ["none", "hermes"])
@pytest.mark.slow
async def test_flags_override_the_template(
    flag: str, built: Callable[[str], Tiny], make_engine: MakeEngine
) -> None:
    settings = {"tool_call_parser": flag, "reasoning_parser": "none"}
    async with (
        make_engine(built("qwen3"), max_model_len=500) as engine,
        served_by(engine, settings=settings) as served,
    ):
        body = {**CHAT, **answering("qwen3"), "tools": TOOLS}
        [choice] = (await posted(served, "/v1/chat/completions", body))["choices"]
        assert "reasoning_content" not in choice["message"]
        content = choice["message"]["content"]
        assert content.startswith("<think>") and ("<tool_call>" in content) == (flag == "none")
        assert ("tool_calls" in choice["message"]) == (flag == "hermes")


async def test_reasoning_at_other_endpoints(built: Callable[[str], Tiny], make_engine: MakeEngine) -> None:
    """A block, or an item, of its own; in a stream it is begun, told and ended."""
    thinking = {"model": MODEL, "temperature": 0, "chat_template_kwargs": {"begin_thinking": True}}
    async with make_engine(built("qwen3"), max_model_len=500) as engine, served_by(engine) as served:
        body = {**thinking, "messages": CHAT["messages"], "max_tokens": 9}
        [block] = (await posted(served, "/v1/messages", body))["content"]
        assert block["type"] == "thinking" and block["thinking"] and block["signature"] == ""
        events = await streamed(served, "/v1/messages", body)
        kinds = [event["type"] for event in events]
        assert kinds[1] == "content_block_start" and kinds[-3:-1] == ["content_block_stop", "message_delta"]
        told = [event["delta"]["thinking"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(told) == block["thinking"] and events[1]["content_block"]["type"] == "thinking"

        body = {**thinking, "input": "Hi", "max_output_tokens": 9}
        [item] = (await posted(served, "/v1/responses", body))["output"]
        assert item["type"] == "reasoning" and item["summary"] == []
        [part] = item["content"]
        assert part["type"] == "reasoning_text" and part["text"]
        events = await streamed(served, "/v1/responses", body)
        [done] = [event for event in events if event["type"] == "response.reasoning_text.done"]
        deltas = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
        assert done["text"] == "".join(deltas) == part["text"]
        [ended] = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert ended["type"] == "reasoning" and ended["content"][0]["text"] == part["text"]
        assert [e["sequence_number"] for e in events] == list(range(len(events)))
