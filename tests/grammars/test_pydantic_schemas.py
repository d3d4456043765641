"""Schemas as pydantic makes them of 22 small models: what is written by them ends, and conforms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support.byte_tokens import TOKENS, llguidance

from aioengine.grammars.schemas import SchemaOptions, prepare_schema

SCHEMAS: dict[str, Any] = json.loads(Path(__file__).with_name("pydantic_schemas.json").read_text())
EOS = 256
BRIEF = [EOS, *b'"}],:1taA']
"""Ends whatever may end; otherwise goes on with the first of these that may come next."""
TALKATIVE = [*b'",:1taA', *b"}]", EOS]
"""Goes on with whatever may go on: another property, another item."""


def written(schema: Any, habit: list[int], options: SchemaOptions, limit: int = 300) -> str | None:
    """What a model with this habit writes; None if it comes to no end."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(prepare_schema(schema, options).text)
    matcher = llguidance.LLMatcher(TOKENS, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    text = bytearray()
    while len(text) < limit:
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(EOS + 1) if mask[token // 8] >> (token % 8) & 1]
        token = next((token for token in habit if token in allowed), allowed[0])
        if token == EOS:
            return text.decode()
        assert matcher.consume_token(token)
        text.append(token)
    return None


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_written_conforms(name: str) -> None:
    text = written(SCHEMAS[name], BRIEF, SchemaOptions())
    assert text is not None
    jsonschema.validate(json.loads(text), SCHEMAS[name])


def test_more_of_them_end_when_they_are_closed() -> None:
    closed, open_ = (
        {name for name, schema in SCHEMAS.items() if written(schema, TALKATIVE, options) is not None}
        for options in (SchemaOptions(), SchemaOptions(open_objects=True))
    )
    assert open_ < closed
    assert len(closed) >= 12
    endless = {"Dicts", "SetOf", "Open"}  # as they should be: any number of entries
    assert not closed & endless
