"""Requests as JSON lines: what flags add to them, and what is refused with which words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aioengine.cli.request_lines import Defaults, Request, parse_lines
from aioengine.errors import RequestInvalid


def parse(*lines: dict[str, Any] | str | bytes, **defaults: Any) -> list[Request]:
    encoded: list[bytes] = []
    for line in lines:
        text = json.dumps(line) if isinstance(line, dict) else line
        encoded.append(text.encode() if isinstance(text, str) else text)
    return parse_lines(encoded, Defaults(**defaults))


def test_a_line_with_everything() -> None:
    (request,) = parse(
        {
            "prompt": "Hi",
            "id": "x",
            "adapter": "sql",
            "n": 3,
            "priority": 2,
            "deadline": 1.5,
            "tenant": "t",
            "seed": 4,
            "logprobs": 2,
            "logit_bias": {"5": -1.0},
            "stop": "end",
            "max_tokens": 7,
        }
    )
    assert (request.id, request.prompt, request.adapter, request.n) == ("x", "Hi", "sql", 3)
    assert request.options == {"adapter": "sql", "priority": 2, "deadline": 1.5, "tenant": "t"}
    params = request.params
    assert (params.seed, params.logprobs, params.max_tokens, params.stop) == (4, 2, 7, ("end",))
    assert params.logit_bias == {5: -1.0}


def test_a_line_with_a_mix() -> None:
    mixed, version = parse(
        {"prompt": "a", "adapter": {"sql": 0.7, "b": -1}}, {"prompt": "b", "adapter": "sql@2"}
    )
    assert (mixed.adapter, version.adapter) == ({"sql": 0.7, "b": -1.0}, "sql@2")
    for wrong, words in (
        ({}, "a mix of 0"),
        ({"sql": 101}, r"adapter\['sql'\]"),
        ({"sql": "x"}, "adapter"),
        (["sql"], "adapter"),
    ):
        with pytest.raises(RequestInvalid, match=f"line 1: .*{words}"):
            parse({"prompt": "a", "adapter": wrong})


def test_a_line_wins_over_flags_field_by_field() -> None:
    flags: dict[str, Any] = {
        "adapter": "sql",
        "n": 2,
        "max_tokens": 5,
        "temperature": 0.5,
        "priority": 1,
        "tenant": "flag",
    }
    given, own = parse(
        {"prompt": "a"},
        {"prompt": "b", "adapter": None, "n": 1, "temperature": 1.0, "tenant": "line"},
        fields=flags,
    )
    assert (given.adapter, given.n, given.params.temperature) == ("sql", 2, 0.5)
    assert given.options == {"adapter": "sql", "priority": 1, "tenant": "flag"}
    assert (own.adapter, own.n, own.params.temperature, own.params.max_tokens) == (None, 1, 1.0, 5)
    assert own.options == {"adapter": None, "priority": 1, "tenant": "line"}


def test_a_byte_order_mark_and_empty_lines_are_no_matter() -> None:
    found = parse(b'\xef\xbb\xbf{"prompt": "a"}\r\n', " ", '{"prompt": "b"}')
    assert [(request.id, request.prompt) for request in found] == [(0, "a"), (1, "b")]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


SYSTEM = {"role": "system", "content": "Be brief"}


def test_chat_and_system_apply_to_lines() -> None:
    (chat,) = parse({"prompt": "Hi"}, chat=True)
    assert chat.prompt == [user("Hi")]
    text, messages, own = parse(
        {"prompt": "Hi"},
        {"messages": [user("Hi")]},
        {"messages": [{"role": "system", "content": "Mine"}, user("Hi")]},
        system="Be brief",
    )
    assert text.prompt == messages.prompt == [SYSTEM, user("Hi")]
    assert own.prompt == [{"role": "system", "content": "Mine"}, user("Hi")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a", "id": 1}, {"prompt": "b"}], "line 2: line 1 has the id 1 too"),
        ([{"prompt": "a", "id": "x"}, "", {"prompt": "b", "id": "x"}], "line 3: line 1 has the id 'x' too"),
        ([{"prompt": "a", "id": 1.0}], "id=1.0: must be an integer, or text"),
        ([{"prompt": "a", "temprature": 1}], "did you mean 'temperature'"),
        ([{"prompt": "a", "constraint": 1}], "unknown field 'constraint'"),
        ([{"prompt": "a", "n": 0}], "n=0: must be >= 1"),
        ([{"prompt": "a", "priority": 1.5}], "priority=1.5: must be an integer"),
        ([{"prompt": "a", "adapter": 3}], "adapter=3: must be text"),
        ([{"prompt": ["a"]}], r"prompt\[0\]='a': must be an integer"),
        ([{"messages": "a"}], "messages='a': must be a list"),
        ([b'{"prompt": "\xff"}'], "line 1"),
        ([b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"], "line 1: is nested too deeply"),
    ],
)
def test_what_is_refused(lines: list[Any], message: str) -> None:
    with pytest.raises(RequestInvalid, match=message):
        parse(*lines)


def test_token_ids_cannot_be_a_message() -> None:
    with pytest.raises(RequestInvalid, match=r"line 1: --chat and --system .* token ids"):
        parse({"prompt": [1, 2]}, chat=True)
