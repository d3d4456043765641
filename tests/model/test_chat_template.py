"""What bounds the rendering of a chat."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.errors import RequestInvalid
from aioengine.model.text import chat_template
from aioengine.model.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi"}] * 1000


@pytest.mark.parametrize(
    "source",
    [
        "{% for n in messages %}{{ n.content }}{% endfor %}",
        "{{ messages | selectattr('role', 'equalto', 'x') | list | length }}",
        "{% for n in messages %}{% if n.role == 'x' %}{% endif %}{% endfor %}",
        "{% for i in range(90000) %}{{ strftime_now('') }}{% endfor %}",
    ],
)
def test_time_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.01)
    with pytest.raises(RequestInvalid, match=r"takes more than 0\.01 s"):
        ChatTemplate("{% for m in messages %}" + source + "{% endfor %}").render({"messages": MESSAGES})


def test_text_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_TEXT", 10_000)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert template.render({"messages": MESSAGES}) == "Hi" * 1000
    with pytest.raises(RequestInvalid, match="more than 10000 characters"):
        template.render({"messages": MESSAGES * 6})


def test_a_long_rendering_lets_go_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(chat_template, "AT_A_STRETCH", 0.0)
    monkeypatch.setattr(
        chat_template.time, "sleep", lambda _seconds: waits.append(threading.current_thread().name)
    )
    ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render({"messages": MESSAGES})
    assert len(waits) > 20


def test_each_rendering_has_its_own_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several threads render with one template."""
    monkeypatch.setattr(chat_template, "MAX_TEXT", 2_500)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(template.render({"messages": MESSAGES})))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["Hi" * 1000] * 8


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=30,
)


@given(VALUES, st.integers(1, 20))
def test_items_are_counted(value: Any, most: int) -> None:
    """A filter that writes them all cannot be interrupted."""

    def count(value: Any) -> int:
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return len(value) + sum(map(count, value)) if isinstance(value, list) else 0

    template = ChatTemplate("{{ value | tojson }}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "MAX_ITEMS", most)
        if count(value) > most:
            with pytest.raises(RequestInvalid, match=f"more than {most} items"):
                template.render({"value": value})
        else:
            assert json.loads(template.render({"value": value})) == value
