"""What is counted in a body before it is decoded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.server.errors import ApiError
from aioengine.server.transport import body as module

TEXTS = st.text(alphabet='ab"\\[]{},:\n\u00e9\U0001f600', max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=30,
)


def counts(value: Any) -> tuple[int, int]:
    """Lists and objects, and strings, in ``value``."""
    if isinstance(value, str):
        return 0, 1
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [counts(item) for item in inner]
    own = 1 if isinstance(value, (list, dict)) else 0
    return own + sum(c for c, _ in found), sum(s for _, s in found)


@given(VALUES, st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_as_many_are_allowed_as_is_said(value: Any, containers: int, strings: int, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    found = counts(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_CONTAINERS", containers)
        patch.setattr(module, "MAX_STRINGS", strings)
        if found[0] > containers or found[1] > strings:
            with pytest.raises(ApiError) as refused:
                module.JsonDecoder(ignores_unknown=False).decode(body, Any)
            assert refused.value.status == 400
        else:
            assert module.JsonDecoder(ignores_unknown=False).decode(body, Any) == value


@given(VALUES, st.integers(0, 12), st.booleans())
def test_values_of_json_that_is_a_text_are_counted(value: Any, most: int, ascii_only: bool) -> None:
    """By their commas: one less in each list or object that is not empty."""

    def commas(value: Any) -> int:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        return max(len(inner) - 1, 0) + sum(map(commas, inner))

    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_VALUES", most)
        module.check_counts(text)  # a body's own have other bounds
        if commas(value) > most:
            with pytest.raises(ApiError, match=f"messages: holds more than {most} values"):
                module.check_counts(text, "messages")
        else:
            module.check_counts(text, "messages")
