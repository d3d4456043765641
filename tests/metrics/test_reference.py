"""docs/metrics.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from aioengine.metrics.families import definitions
from aioengine.metrics.reference import reference

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "metrics.md"


def test_the_page_is_up_to_date() -> None:
    command = "python -m aioengine.metrics.reference > docs/metrics.md"
    assert DOCS.read_text(encoding="utf-8") == reference(), f"run: {command}"


def test_it_has_every_metric() -> None:
    for definition in definitions.ALL:
        assert f"| `{definition.exposed}` | {definition.kind} |" in reference()
