"""Parts of the tests: they are all of them, no test is in two, and no file with a wanted one is left out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path

import pytest
from support.selection import KINDS, WANTED, keeps, may_keep

TESTS = Path(__file__).parent
MARKS = [set(marks) for size in range(len(KINDS) + 1) for marks in combinations(KINDS, size)]
"""What a test may be: neither slow nor timed, one of them, or both."""


def parts() -> Iterator[dict[str, str]]:
    for how in product(WANTED, repeat=len(KINDS)):
        yield dict(zip(KINDS, how, strict=True))


@pytest.mark.parametrize("marks", MARKS)
def test_a_test_is_in_one_of_the_parts(marks: set[str]) -> None:
    for wanted in parts():
        split = [[how] if how != "with" else ["without", "only"] for how in wanted.values()]
        runs = [keeps(marks, dict(zip(KINDS, how, strict=True))) for how in product(*split)]
        assert sum(runs) == keeps(marks, wanted)
    assert keeps(marks, dict.fromkeys(KINDS, "with")), "all of them run by default"


def written(kinds: set[str], style: str) -> str:
    """A file in which the last test has these markers, and the first has them if all of it has."""
    marks = [f"pytest.mark.{kind}" for kind in sorted(kinds)]
    first, last = "def test_first():\n    pass\n", "def test_last():\n    pass\n"
    match style:
        case "file" if len(marks) == 1:
            return f"pytestmark = {marks[0]}  # all of it\n\n{first}\n{last}"
        case "file" | "list":
            return f"pytestmark = [\n    {', '.join(marks)},\n]\n\n{first}\n{last}"
        case "decorators":
            return first + "\n" + "".join(f"@{mark}\n" for mark in marks) + last
        case "helper" if kinds == {"slow"}:
            return f'@pytest.mark.parametrize("n", mostly_slow([1, 2], 1))\n{last}'
    return f'@pytest.mark.parametrize("n", [1, pytest.param(2, marks=[{", ".join(marks)}])])\n{last}'


@pytest.mark.parametrize("style", ["file", "list", "decorators", "values", "helper"])
@pytest.mark.parametrize("known", [{"timed"}, set()])
@pytest.mark.parametrize("kinds", MARKS)
def test_a_file_with_a_test_that_is_wanted_is_read(kinds: set[str], known: set[str], style: str) -> None:
    text = written(kinds, style)
    others = kinds if style in ("file", "list") else set[str]()
    for wanted in parts():
        if keeps(kinds | known, wanted) or keeps(others | known, wanted):
            assert may_keep(text, wanted, known), (text, wanted)


def test_a_file_without_one_is_not_even_read() -> None:
    without, only = {"slow": "without", "timed": "with"}, {"slow": "only", "timed": "with"}
    assert not may_keep(written({"slow"}, "file"), without)
    assert not may_keep(written({"timed"}, "decorators"), only)


def test_markers_are_named_beside_the_tests() -> None:
    """Where tests took them from other files, a file's text would not say whether it may have any."""
    others = [path for path in TESTS.rglob("*.py") if not path.name.startswith("test_")]
    marked = [path.name for path in others if any(f"mark.{kind}" in path.read_text() for kind in KINDS)]
    assert marked == ["selection.py"], "whose functions' names say so"
