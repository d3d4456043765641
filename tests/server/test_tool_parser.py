"""Tagged calls of tools, however the text is cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.server.openai.tools import TaggedCalls

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
