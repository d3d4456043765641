"""``aioengine bench`` as a user runs it."""

from __future__ import annotations

import pytest
from support.engine_fixtures import Tiny, tiny_text

from aioengine.cli.main import main

__all__ = ["tiny_text"]

SMALL = ["--requests", "3", "--prompt-tokens", "8", "--output-tokens", "4", "--repeats", "1"]


def test_it_prints_a_row_for_each_number_of_adapters(
    tiny_text: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ["--model", str(tiny_text.model), "--dtype", "float32", "--kv-cache-memory", "8MiB"]
    assert main(["bench", *SMALL, *engine, "--adapters", "1", "3", "--rank", "5"]) == 0
    out = capsys.readouterr().out
    assert "3 requests x 8 + 4 tokens" in out
    rows = {line.strip().split("  ")[0]: line.split() for line in out.splitlines() if "%" in line}
    assert list(rows) == ["base", "1 adapters, rank 5", "3 adapters, rank 5"]
    assert rows["base"][-1] == "100%" and float(rows["base"][1]) > 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--requests", "0"], "--requests=0"),
        (["--adapters", "0"], "--adapters=0"),
        (["--rank", "513"], "--rank=513"),
    ],
)
def test_what_is_wrong_is_named(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert says in capsys.readouterr().err
