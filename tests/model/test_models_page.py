"""docs/models.md says what the code does; ``python tests/model/test_models_page.py`` writes its table."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = (
    "<!-- table: written by python tests/model/test_models_page.py -->\n",
    "<!-- end of the table -->\n",
)


def written(page: str) -> str:
    """The page with the table that the code makes."""
    from support.models_page import table

    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


@pytest.mark.slow
def test_the_table_is_what_the_code_makes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert written(page) == page, "run python tests/model/test_models_page.py"


def test_the_page_names_the_settings_and_the_files_that_it_speaks_of() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:aioengine|kernels|tests|benchmarks)/[\w/]+\.py)`", page):
        assert (ROOT / path).is_file(), path


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
