"""Help: it fits a screen, shows examples, and leaves nothing out when asked for all."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.cli_programs import run_program

from aioengine.cli.flags import EngineFlags
from aioengine.cli.main import COMMANDS, main
from aioengine.cli.process import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from aioengine.request import SamplingParams

TOP = dict.fromkeys(command.split()[0] for command in COMMANDS)
PAGES = ["", *TOP, *(command for command in COMMANDS if command.startswith("lab "))]


def help_of(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str = "--help"
) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*command.split(), flag]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", PAGES)
@pytest.mark.slow
def test_it_fits_a_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(command, capsys, monkeypatch)
    lines = text.splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 100
    assert text.startswith(f"Usage: aioengine {command}")
    assert f"Examples:\n  aioengine {command}" in text
    assert "--help" in lines[-1] or "Exit codes" in text


@pytest.mark.parametrize("command", TOP | COMMANDS)
@pytest.mark.slow
def test_each_flag_is_described_in_plain_text(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no mark-up, and no blanks of the source's lines."""
    text = help_of(command, capsys, monkeypatch, "--help-all")
    assert "``" not in text
    for line in text.splitlines():
        if re.match(r"  (--|[A-Z]{2,} )", line):
            assert len(re.split(" {2,}", line.strip())) == 2, line
        elif line.startswith(" " * 20):
            assert "  " not in line.strip(), line


def test_the_first_page_has_the_commands_and_the_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([]) == 0
    assert "Commands" in capsys.readouterr().out
    text = help_of("", capsys, monkeypatch)
    for command in TOP:
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {command} "))
        assert len(line.split()) > 3  # it says what the command does
    for code in ("0 done", "1 some", "2 wrong", "130 interrupted", "141 the reader"):
        assert code in text


@pytest.mark.parametrize("command", ["generate", "plan"])
@pytest.mark.slow
def test_all_flags(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    short = help_of(command, capsys, monkeypatch)
    full = help_of(command, capsys, monkeypatch, "--help-all")
    assert set(short.splitlines()) <= set(full.splitlines())
    for field in dataclasses.fields(EngineFlags):
        name = "engine-name" if field.name == "name" else field.name.replace("_", "-")
        assert f"--{name}" in full
    for name in ("--debug", "--log-level"):
        assert name in full and name not in short


def test_the_document_leaves_nothing_out() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
    for command in TOP:
        assert f"| `aioengine {command}" in document
    for name in SamplingParams.__struct_fields__:
        assert (f'`"{name}"`' in document) == (name != "constraint")
    for code in (0, 1, 2, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE):
        assert f"\n| {code} |" in document


@pytest.mark.slow
def test_completion_in_bash(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    done = run_program("--install-completion", "--shell", "bash", env={"HOME": str(tmp_path), "PATH": ""})
    assert done.returncode == 0, done.stderr
    installed = tmp_path / ".local/share/bash-completion/completions/aioengine"
    asked = (
        f"source {installed}; COMP_WORDS=(aioengine plan --max-lora-r); COMP_CWORD=2; "
        '_aioengine; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run([bash, "-c", asked], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "--max-lora-rank\n"


@pytest.mark.slow
def test_colour_only_where_it_is_wanted() -> None:
    plain = run_program("--help")
    assert "\x1b[" not in plain.stdout
    forced = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    assert "\x1b[1m" in run_program("--help", env=forced).stdout
