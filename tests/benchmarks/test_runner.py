"""Cases take turns, what they took becomes a table, and the documentation names cases that there are."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import ROOMS, application, cases, main
from benchmarks.gpu.everything import run_part
from benchmarks.runner import Calls, measure, table

ROOT = Path(__file__).parents[2]


async def test_calls_take_turns() -> None:
    order: list[str] = []

    def call(name: str, count: float) -> float:
        order.append(name)
        return count

    runs, failed = await measure(Calls("", {"a": lambda: call("a", 1), "b": lambda: call("b", 2)}, rounds=2))
    assert order == ["a", "b", "b", "a", "a", "b"] and not failed
    assert [len(of) for of in runs.values()] == [2, 2], "the first round warms up"
    assert all(run.figures["tokens/s"] == 1 / run.seconds for run in runs["a"])


async def test_a_call_that_fails_loses_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    tried = 0

    def broken() -> None:
        nonlocal tried
        tried += 1
        raise ValueError("no | luck\nat all")

    async def figures() -> dict[str, float]:
        return {"gap, ms": 4.0, "reads": 3}

    calls = Calls("Title", {"broken": broken, "whole": figures}, rounds=2)
    runs, failed = await measure(calls)
    printed = re.sub(" +", " ", str(table(calls, runs, failed)))
    assert tried == 1
    assert "| broken | failed: ValueError: no \\| luck | | | |" in printed
    assert "| whole | 4 | 4 .. 4 | 1.000 | 3 |" in printed


def commands() -> list[str]:
    """All of the documentation."""
    found = re.findall(r"-m benchmarks (.+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")):
        text = path.read_text(encoding="utf-8")
        found += re.findall(r"^python -m benchmarks (.+?) *(?:#.*)?$", text, re.MULTILINE)
        found += re.findall(r"`python\s+-m\s+benchmarks\s+([^`]+)`", text)
    return sorted({" ".join(command.split()) for command in found})


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_the_documentation_names_cases_that_there_are(command: str) -> None:
    words = shlex.split(command)
    if words != ["--list"]:
        function, _, _ = application(words[0]).parse_args(words[1:], print_error=False, exit_on_error=False)
        assert function in cases(words[0])


def test_every_case_says_what_it_measures() -> None:
    for room in ROOMS:
        for case in cases(room):
            assert (case.__doc__ or "").strip(), case.__name__


def test_an_unknown_room_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere"]) == 2
    assert "engine, kernels" in capsys.readouterr().err


def test_a_part_that_hangs_or_fails_keeps_what_it_has_printed() -> None:
    for rest, said in (("import time; time.sleep(60)", "after 1 s"), ("raise SystemExit(3)", "ended with 3")):
        printed = run_part((sys.executable, "-c", f"print('measured', flush=True); {rest}"), 1)
        assert printed.startswith("measured") and said in printed


def test_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        main(["gpu", "everything"])


def test_a_case_on_the_real_core_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "scheduling", "--policies", "fcfs", "--waiting", "10", "--steps", "2"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| fcfs")]
    numbers = [float(cell.replace(",", "")) for cell in row.split("|")[2:-1]]
    assert numbers[0] > 0 and numbers[-1] > 0, row
