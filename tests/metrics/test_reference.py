"""docs/metrics.md has the tables that the definitions make, which running this file prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from aioengine.metrics.families.definitions import OWN, PROCESS, VLLM, Definition

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "metrics.md"
TABLES = {"own": OWN, "process": PROCESS, "vllm": VLLM}


def rows(table: Mapping[str, Definition]) -> str:
    def row(metric: Definition) -> str:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        return f"| `{metric.exposed}` | {metric.kind} | {labels} | {metric.help} |"

    head = ["| Name | Type | Labels | What it is |", "|---|---|---|---|"]
    return "\n".join([*head, *map(row, table.values())]) + "\n"


def buckets() -> Iterator[str]:
    by_bounds: dict[tuple[float, ...], list[str]] = {}
    for metric in OWN.values():
        if metric.kind == "histogram":
            by_bounds.setdefault(metric.buckets, []).append(f"`{metric.name}`")
    for bounds, names in by_bounds.items():
        yield f"- {', '.join(names)}: {', '.join(f'{bound:g}' for bound in bounds)}\n"


@pytest.mark.parametrize("table", TABLES)
def test_the_page_is_up_to_date(table: str) -> None:
    assert f"\n{rows(TABLES[table])}\n" in DOCS.read_text(encoding="utf-8") + "\n"


def test_it_has_the_buckets() -> None:
    assert "".join(buckets()) in DOCS.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(*map(rows, TABLES.values()), "".join(buckets()), sep="\n")
