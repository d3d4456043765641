"""Calls and reasoning in the formats of model families, however the text is cut."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.byte_tokens import TOKENS, llguidance
from support.machine import slowness

from aioengine.errors import ConfigError
from aioengine.grammars.schemas import SchemaOptions
from aioengine.server.formats.calls import JSON_TEXT, MAX_CALLS, REASONING, TOOLS
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai.api import Function, Tool
from aioengine.server.openai.form import AnswerFormats, ToolPlan, plan_tools
from aioengine.server.settings import ServerSettings

NAMES = frozenset({"f", "g"})
TEMPLATES = {
    "harmony": "<|start|>assistant<|channel|>",
    "mistral": "[TOOL_CALLS]",
    "mistral with [ARGS]": "[TOOL_CALLS] [ARGS]",
    "hermes": "<tool_call></tool_call>",
    "llama3": '<|start_header_id|>"parameters"',
}
CALL = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
LLAMA = '{"name": "f", "parameters": {"x": 1}}'
NAMED, LISTED = '[TOOL_CALLS]f[ARGS]{"x": 1}', '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}'
TO_F = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
HARMONY = TO_F + '{"x": 1}<|call|>'
THOUGHT = "<|channel|>analysis<|message|>why<|end|><|start|>assistant"

Found = tuple[str, str, list[tuple[str, Any]]]
"""Reasoning, text and calls."""


def parse(parser: AnswerParser, pieces: Sequence[str]) -> Found:
    text, reasoning, calls = "", "", []
    for parsed in (*map(parser.push, pieces), parser.push("", is_last=True)):
        text += parsed.text
        reasoning += parsed.reasoning
        calls += [(call.function.name, json.loads(call.function.arguments)) for call in parsed.calls]
    return reasoning, text, calls


def parser(tools: str, reasoning: str = "none", *, single: bool = False, open_: bool = False) -> AnswerParser:
    formats = AnswerFormats.chosen(TEMPLATES.get(tools, ""), tools.partition(" ")[0], reasoning)
    found = formats.parser(NAMES, single=single, is_thinking=open_)
    assert found is not None
    return found


ONE = [("f", {"x": 1})]
CASES: list[tuple[str, str, str | None, list[tuple[str, Any]]]] = [
    ("hermes", "plain", None, []),
    ("hermes", CALL, "", ONE),
    ("hermes", f"before{CALL}after", "beforeafter", ONE),
    ("hermes", f" \n{CALL}\n{CALL.replace('f', 'g', 1)}\n", "", [*ONE, ("g", {"x": 1})]),
    ("hermes", CALL.replace(": 1", ': "</tool_call>{"'), "", [("f", {"x": "</tool_call>{"})]),
    ("hermes", CALL.replace('"f"', '"h"'), None, []),
    ("hermes", CALL.replace('{"x": 1}', "3"), None, []),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", {})]),
    ("hermes", f"<tool_call>nonsense</tool_call>{CALL}", "<tool_call>nonsense</tool_call>", ONE),
    ("hermes", f'<tool_call>{{"name": "f"</tool_call>{CALL}', '<tool_call>{"name": "f"</tool_call>', ONE),
    ("hermes", '<tool_call>{"name": "f"', None, []),
    ("hermes", '<tool_call>{"name": "f}\n', None, []),
    ("hermes", "a <tool_ca", None, []),
    ("llama3", LLAMA, "", ONE),
    ("llama3", f"<|python_tag|>{LLAMA}; {LLAMA}", "", ONE * 2),
    ("llama3", f"{LLAMA}\n{LLAMA}", "", ONE * 2),
    ("llama3", f"{LLAMA} is what I call", " is what I call", ONE),
    ("llama3", f"I call {LLAMA}", None, []),
    ("llama3", '{"answer": 3}', None, []),
    ("llama3", '<|python_tag|>print("f")', None, []),
    ("mistral", f"{LISTED}]", "", ONE),
    ("mistral", f'{LISTED}, {{"name": "g", "arguments": {{}}}}]', "", [*ONE, ("g", {})]),
    ("mistral", f"so {NAMED}{NAMED}", "so ", ONE * 2),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]a1[ARGS]{"x": 1}', "", ONE),
    ("mistral", '[TOOL_CALLS]f{"x": 1}', "", ONE),
    ("mistral", '[TOOL_CALLS]h[ARGS]{"x": 1}', None, []),
    ("mistral", "[TOOL_CALLS][1, 2]", None, []),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]{"x": 1}', None, []),
    ("mistral", f"{LISTED}", "", ONE),
    ("mistral", f"{LISTED} then", " then", ONE),
    ("harmony", "no channel", None, []),
    ("harmony", "<|channel|>final<|message|>hello", "hello", []),
    ("harmony", HARMONY, "", ONE),
    ("harmony", HARMONY.removesuffix("<|call|>"), "", ONE),
    ("harmony", ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}', "", ONE),
    ("harmony", f"<|channel|>commentary<|message|>I look<|end|><|start|>assistant{HARMONY}", "I look", ONE),
    ("harmony", TO_F, "", [("f", {})]),
    ("harmony", TO_F + '{"x": ', None, []),
    ("harmony", TO_F.replace("s.f", "s.h") + '{"x": 1}<|call|>', '{"x": 1}', []),
    ("harmony", f"{THOUGHT}<|channel|>final<|message|>hello<|return|>", "whyhello", []),
]


@pytest.mark.parametrize(("name", "text", "left", "calls"), CASES, ids=range(len(CASES)))
def test_what_is_a_call(name: str, text: str, left: str | None, calls: list[tuple[str, Any]]) -> None:
    assert parse(parser(name), [text]) == ("", text if left is None else left, calls)


@pytest.mark.parametrize(
    ("text", "open_", "found"),
    [
        ("<think>\nwhy\n</think>\n\nso", False, ("why\n", "so", [])),
        ("why</think>so", True, ("why", "so", [])),
        ("<think>why", False, ("why", "", [])),
        ("why", False, ("", "why", [])),
        ("  why <think>not</think>", False, ("", "  why <think>not</think>", [])),
        (f"<think>{CALL}</think>\n\n{CALL}", False, (CALL, "", ONE)),
        ("<think></think>", False, ("", "", [])),
    ],
)
def test_reasoning_comes_first(text: str, open_: bool, found: Found) -> None:
    assert parse(parser("hermes", "think", open_=open_), [text]) == found
    without = AnswerFormats.chosen(None, "none", "think").parser(frozenset(), single=False, is_thinking=open_)
    assert without is not None and parse(without, [text])[0] == found[0]


def test_reasoning_of_harmony() -> None:
    text = f"{THOUGHT}{THOUGHT}<|channel|>final<|message|>hello<|return|>"
    assert parse(parser("harmony", "harmony"), [text]) == ("whywhy", "hello", [])
    assert parse(parser("harmony", "harmony"), [THOUGHT + HARMONY]) == ("why", "", ONE)


PARTS = (
    *(CALL, LLAMA, NAMED, LISTED, HARMONY, THOUGHT, "<think>", "</think>", "<tool_call>"),
    *("</tool_call>", "\n", "text", "<", " ", ";", "]", ", ", "{", "}", '"', "\\", "[TOOL_CALLS]", "[ARGS]"),
    *("<|start|>", "é", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", " to=functions.f"),
)


@pytest.mark.parametrize("reasoning", ["none", *REASONING])
@pytest.mark.parametrize("name", TOOLS)
@settings(derandomize=True, max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=8), single=st.booleans(), data=st.data())
@pytest.mark.slow
def test_the_cuts_change_nothing_and_no_text_is_lost(
    name: str, reasoning: str, parts: list[str], single: bool, data: st.DataObject
) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = parse(parser(name, reasoning, single=single), [text])
    assert parse(parser(name, reasoning, single=single), pieces) == whole
    one_by_one = [piece for character in text for piece in (character, "")]
    assert parse(parser(name, reasoning, single=single), one_by_one) == whole
    _, left, calls = whole
    if not calls and reasoning == "none" and name != "harmony":
        assert left == text


@pytest.mark.parametrize("name", TOOLS)
@pytest.mark.slow
def test_long_answers_take_time_in_proportion(name: str) -> None:
    """Whatever they consist of, in one piece and in many."""
    for part in (
        "<tool_call>{",
        '{"name": "',
        "[TOOL_CALLS]f[CALL_ID]",
        TO_F,
        "<",
        "[",
        " ",
    ):
        text = part * (40_000 // len(part))
        for pieces in ([text], [text[i : i + 4] for i in range(0, len(text), 4)]):
            began = time.thread_time()
            parse(parser(name), pieces)
            assert time.thread_time() - began < 2 * slowness(), (part, len(pieces))


def test_formats_by_chat_template() -> None:
    for name, template in TEMPLATES.items():
        chosen = AnswerFormats.chosen(template, "auto", "auto")
        assert chosen.tools == name.partition(" ")[0]
        assert chosen.reasoning == ("harmony" if name == "harmony" else None)
    qwen = AnswerFormats.chosen("<tool_call></tool_call><think></think>", "auto", "auto")
    assert (qwen.tools, qwen.reasoning) == ("hermes", "think")
    assert AnswerFormats.chosen(TEMPLATES["hermes"], "llama3", "none").tools == "llama3"
    assert AnswerFormats.chosen(None, "auto", "auto")[:2] == (None, None)
    for field, known in (("tool_call_parser", TOOLS), ("reasoning_parser", REASONING)):
        for name in known:
            ServerSettings(**{field: name})
        with pytest.raises(ConfigError, match=f"{field}='harmoni'.*did you mean 'harmony'"):
            ServerSettings(**{field: "harmoni"})


texts = st.text(st.sampled_from('ab"\\{}[],:é\n'), max_size=8)


def takes(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(TOKENS, llguidance.LLMatcher.grammar_from_lark(grammar), log_level=0)
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


def test_how_many_calls_the_grammar_allows() -> None:
    plan = plan_tools([Tool(function=Function(name="f"))], "required", True)

    def allowed(plan: ToolPlan, calls: int) -> bool:
        text = "[" + ",".join(['{"name": "f", "arguments": {}}'] * calls) + "]"
        return takes(plan.grammar(SchemaOptions(), JSON_TEXT, {})[0], text)

    counts = (0, 1, 2, MAX_CALLS, MAX_CALLS + 1)
    assert [allowed(plan, calls) for calls in counts] == [False, True, True, True, False]
    for parallel in (None, False):
        found = [allowed(plan._replace(parallel=parallel), calls) for calls in counts]
        assert found == [False, True] + 3 * [False]


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_that_are_held_to_a_familys_form_are_parsed(name: str) -> None:
    """What the grammar takes, the parser reads; and nothing else is taken."""
    parameters = {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]}
    tools = [Tool(function=Function(name=each, parameters=parameters)) for each in sorted(NAMES)]
    formats = AnswerFormats.chosen(TEMPLATES[name], "auto", "auto")
    written, held = formats.written, formats.parser(NAMES, single=False, is_held=True)
    assert held is not None
    wanted = [("f", {"x": '<}"</tool_call>;'}), ("g", {"x": ""})][: written.most]
    calls = [
        written.opening.format(each) + json.dumps(arguments, separators=(",", ":")) + written.closing
        for each, arguments in wanted
    ]
    text = written.begin + written.between.join(calls) + written.end
    grammar, _ = plan_tools(tools, "required", True).grammar(SchemaOptions(), written, {})
    assert (
        takes(grammar, text) and not takes(grammar, "text") and not takes(grammar, text.replace('"x"', '"y"'))
    )
    assert parse(held, list(text)) == ("", "", wanted)
    if written.most > 1:
        alone, _ = plan_tools(tools, "required").grammar(SchemaOptions(), written, {})
        assert not takes(alone, text) and takes(alone, written.begin + calls[0] + written.end)


numbers = st.from_regex(
    r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?",
    fullmatch=True,
    alphabet="-+.eE0123456789",
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.sampled_from([*TEMPLATES, ""]), numbers, texts)
@example("", "1e999", "")
@example("hermes", "9" * 5000, r"\ ")
@example("llama3", "[" * 300 + "]" * 300, ' "{" ')
def test_arguments_are_passed_on_as_they_are_written(name: str, number: str, text: str) -> None:
    """Whatever JSON can hold: numbers that no float has, which a grammar lets a model write."""
    written = f'{{ "x": {number},\n"y" : {json.dumps(text)} }}'
    expected = f'{{"x":{number},"y":{json.dumps(text)}}}'
    formats = AnswerFormats.chosen(TEMPLATES.get(name), "auto", "auto")
    form = formats.written
    answer = form.begin + form.opening.format("f") + written + form.closing + form.end
    for is_held in (True, False) if formats.tools is not None else (True,):
        parser = formats.parser(NAMES, single=True, is_held=is_held)
        assert parser is not None
        calls = [*parser.push(answer).calls, *parser.push("", is_last=True).calls]
        assert [(call.function.name, call.function.arguments) for call in calls] == [("f", expected)]
