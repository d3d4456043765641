"""The parts that the tests are run in: ``--slow`` and ``--timed``, each "with", "without" or "only".

The files of tests name the markers, so that a file's text says whether a part may have tests in it: what a
run leaves out is not even imported. Every test is in exactly one of "without" and "only" of each kind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest

KINDS = ("slow", "timed")
"""Markers that split the tests."""
WANTED = ("with", "without", "only")


def mostly_slow(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Make values of ``parametrize`` of which all but those in ``fast`` are slow."""
    values = list(values)
    assert all(value in values for value in fast), f"{fast}: not all are among {values}"
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def mostly_slow_rows(rows: Iterable[tuple[Any, ...]], *fast: tuple[Any, ...]) -> list[Any]:
    """Do the same for several arguments at once."""
    rows = list(rows)
    assert all(row in rows for row in fast), f"{fast}: not all are among {rows}"
    return [row if row in fast else pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def keeps(markers: Collection[str], wanted: Mapping[str, str]) -> bool:
    """Whether a test with these markers runs where so much is wanted of each kind."""
    return all(how == "with" or (kind in markers) == (how == "only") for kind, how in wanted.items())


def may_keep(text: str, wanted: Mapping[str, str], known: Collection[str] = ()) -> bool:
    """Whether a file with this text may have tests that run. All its tests have the markers in ``known``."""
    return all(
        _may_have(text, kind, known) if how == "only" else how == "with" or not _has_all(text, kind, known)
        for kind, how in wanted.items()
    )


def _may_have(text: str, kind: str, known: Collection[str]) -> bool:
    return kind in known or kind in text


def _has_all(text: str, kind: str, known: Collection[str]) -> bool:
    """A list of markers is not read: such a file is imported, and its tests are left out one by one."""
    all_of_it = rf"^pytestmark = pytest\.mark\.{kind}\b"
    return kind in known or re.search(all_of_it, text, re.MULTILINE) is not None
