"""Tagged calls of tools, however the text is cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.byte_tokens import TOKENS, llguidance

from aioengine.grammars.schemas import SchemaOptions
from aioengine.server.openai.chat_api import Function, Tool
from aioengine.server.openai.tools import MAX_CALLS, ListedCalls, TaggedCalls, ToolPlan, plan_tools

CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'


def parse(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser = TaggedCalls(frozenset({"f", "g"}))
    text, calls = "", []
    for piece in pieces:
        parsed = parser.push(piece)
        text += parsed.text
        calls += parsed.calls
    rest = parser.finish()
    return text + rest.text, [(c.function.name, c.function.arguments) for c in [*calls, *rest.calls]]


@pytest.mark.parametrize(
    ("text", "left", "names"),
    [
        ("plain", "plain", []),
        (CALL, "", ["f"]),
        (f"before{CALL}after", "beforeafter", ["f"]),
        (f"{CALL}\n{CALL.replace('f', 'g', 1)}", "", ["f", "g"]),
        ('<tool_call>{"name": "h", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": 3}</tool_call>', None, []),
        ("<tool_call>nonsense</tool_call>", None, []),
        ('<tool_call>{"name": "f"', None, []),
        ("a <tool_ca", None, []),
        ('<tool_call>{"name": "f"}</tool_call>', "", ["f"]),
    ],
)
def test_what_is_a_call(text: str, left: str | None, names: list[str]) -> None:
    found, calls = parse([text])
    assert found == (text if left is None else left)
    assert [name for name, _ in calls] == names
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@settings(derandomize=True, max_examples=200)
@given(
    st.lists(
        st.sampled_from([CALL, "<tool_call>", "</tool_call>", "\n", "text", "<", "<tool_call>{}"]), max_size=6
    ),
    st.data(),
)
def test_the_cuts_change_nothing(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(pieces) == parse([text])


texts = st.text(st.sampled_from('ab"\\{}[],:é\n'), max_size=8)
calls_with = st.lists(st.dictionaries(texts, st.one_of(texts, st.lists(texts, max_size=2))), max_size=3)


@settings(derandomize=True, max_examples=200)
@given(calls_with, st.booleans(), st.data())
def test_listed_calls_come_when_complete(wanted: list[Any], escape: bool, data: st.DataObject) -> None:
    calls = [json.dumps({"name": "f", "arguments": found}, ensure_ascii=escape) for found in wanted]
    text = "[" + ",".join(calls) + "]"
    ends = [1 + sum(map(len, calls[: i + 1])) + i for i in range(len(calls))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parser, found, told = ListedCalls(), [], 0
    for piece in [text[a:b] for a, b in zip([0, *cuts], cuts, strict=False)]:
        found += parser.push(piece).calls
        told += len(piece)
        assert len(found) == sum(end <= told for end in ends)
    assert [json.loads(call.function.arguments) for call in found] == wanted[: len(found)]
    assert parser.finish() == ("", ())


def test_how_many_calls_the_grammar_allows() -> None:
    plan = plan_tools([Tool(function=Function(name="f"))], "required", True)

    def takes(plan: ToolPlan, calls: int) -> bool:
        grammar = llguidance.LLMatcher.grammar_from_lark(plan.grammar(SchemaOptions())[0])
        matcher = llguidance.LLMatcher(TOKENS, grammar, log_level=0)
        text = "[" + ",".join(['{"name": "f", "arguments": {}}'] * calls) + "]"
        return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())

    counts = (0, 1, 2, MAX_CALLS, MAX_CALLS + 1)
    assert [takes(plan, calls) for calls in counts] == [False, True, True, True, False]
    for parallel in (None, False):
        assert [takes(plan._replace(parallel=parallel), calls) for calls in counts] == [False, True] + 3 * [
            False
        ]
