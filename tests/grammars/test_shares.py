"""What the grammars of all tenants share: memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from aioengine.grammars.service import largest_of_most


def grammar(memory: int, *users: str | None) -> Any:
    return SimpleNamespace(memory=memory, rows=dict(enumerate(users)))


def test_memory_is_taken_from_the_tenant_that_has_most() -> None:
    many = [grammar(20, "hog") for _ in range(5)]
    largest, shared = grammar(50, "b", "b"), grammar(60, "b", "hog")
    assert largest_of_most([*many, largest]) is many[0], "and not the largest of all"
    assert largest_of_most([*many, largest, shared]) is shared
    assert largest_of_most([largest, grammar(40, "c")]) is largest
    assert largest_of_most([grammar(1), largest]) is largest
