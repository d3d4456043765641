"""The capacity page's example is a workload that its command takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from aioengine.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_page_says_what_the_command_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "lab.md").read_text(encoding="utf-8")
    found = re.search(r"^aioengine (lab size .*capacity\.toml .*\\\n.*)$", page, flags=re.MULTILINE)
    assert found is not None
    command = re.sub(r" --(seeds|max-replicas) \d+", "", found[1].replace("\\\n", " "))
    command += f" --limit 60 --seeds 1 --replicas 2 --jobs 1 --out {tmp_path / 'out'}"
    assert main(shlex.split(command)) == 0
    printed = capsys.readouterr().out
    assert "2 replicas: served = 100%" in printed
