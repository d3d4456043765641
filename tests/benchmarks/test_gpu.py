"""``python -m benchmarks.gpu``, which runs when a GPU is lent for ten minutes: nothing may fail then."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from benchmarks.kernels.sheets import Row, Sheet, Wrong, against, markdown, measured, read_entries
from hypothesis import given
from hypothesis import strategies as st
from support import measuring
from support.fake_gpu import run_on_fake_gpu

from benchmarks import gpu as conductor
from benchmarks import gpu_engines
from benchmarks.gpu import GRACE, Outcome, Part, conduct, parts, report, run_all, summary_of_tests
from benchmarks.kernels import gpu

SHEETS = {
    "Results beside the reference": 3 + 6 + 4,
    "Decode steps, 1 layers and head, context 20, rank 8; ms": 4,
    "Prompts, 1 layers; ms": 1,
    "Gate and up with quantized weights; ms": 8 * 2,
    "A layer beside its linears; us": 2 * 2 + 3 * 4,
    "Linears with adapters, bfloat16; us": 2 * 3,
}
"""Rows of every table in the shapes of ``measuring.OPTIONS``."""


def tables(printed: str) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for entry in read_entries(printed):
        if "title" in entry:
            rows = found[entry["title"]] = []
        elif "cells" in entry:
            rows.append(entry["cells"])
    return found


def errors(printed: str) -> list[str]:
    return [entry["error"] for entry in read_entries(printed) if "error" in entry]


@pytest.fixture(scope="module")
def runs() -> list[measuring.Ended]:
    """All parts, and two of them when an operation does not work, or brings the device down."""
    some = [*measuring.OPTIONS, "--json", "--parts", "layer", "linears"]
    return measuring.run(
        measuring.Run([*measuring.OPTIONS, "--json"]),
        measuring.Run(some, "silu_and_mul"),
        measuring.Run(some, "silu_and_mul:fault"),
    )


@pytest.mark.slow
def test_every_part_is_measured_beside_its_prediction(runs: list[measuring.Ended]) -> None:
    done = runs[0]
    assert done.code == 0 and not errors(done.printed), done.printed
    found = tables(done.printed)
    assert {title: len(rows) for title, rows in found.items()} == SHEETS
    assert all(cell for rows in found.values() for row in rows for cell in row)
    for title in list(SHEETS)[1:]:
        assert all(float(row[-1].strip("*%")) > 0 for row in found[title])
    quantized = found["Gate and up with quantized weights; ms"]
    assert {row[2] for row in quantized} == {"0.50"}  # what the timer says


@pytest.mark.slow
def test_a_row_that_fails_loses_no_other(runs: list[measuring.Ended]) -> None:
    done = runs[1]
    assert done.code == 1
    found = tables(done.printed)
    layer = found["A layer beside its linears; us"]
    assert [row[-1] for row in layer].count("failed") == 2 and len(layer) == 16
    assert len(found["Linears with adapters, bfloat16; us"]) == 6
    assert [error.split(": ", 1)[1] for error in errors(done.printed)] == [
        "RuntimeError: it does not work"
    ] * 2


@pytest.mark.slow
def test_after_a_fault_of_the_device_nothing_is_measured(runs: list[measuring.Ended]) -> None:
    """The process cannot use it any more, so that later rows would say nothing of the kernels."""
    done = runs[2]
    assert done.code == 1
    assert [len(rows) for rows in tables(done.printed).values()] == [2]  # a norm, and what failed
    assert "illegal memory access" in errors(done.printed)[0]


@pytest.mark.slow
def test_in_the_real_shapes_every_grid_is_legal_and_compiling_fits_into_the_time() -> None:
    """A kernel takes a second to compile, or less; what a part compiles must leave time to measure."""
    compiled = run_on_fake_gpu("measured_parts")
    limits = {part.name.split()[0]: part.seconds for part in parts()}
    assert set(compiled) == set(gpu.PARTS) - {"checks"}
    for part, (kernels, faults, rows) in compiled.items():
        assert faults == [] and rows >= 3
        assert kernels < 0.5 * limits[part], f"{part}: {kernels} kernels in {limits[part]} s"


def test_every_command_is_one_that_its_program_takes() -> None:
    every = parts(measuring.OPTIONS)
    assert sum(part.seconds for part in every) < 1.5 * 9 * 60
    names = [part.name for part in every]
    assert len(set(names)) == len(names) and {"engine", "vllm", "tests"} < set(names)
    found = set()
    for part in every:
        if part.command[2] == "benchmarks.kernels.gpu":
            args = gpu.parser().parse_args(part.command[3:])
            assert args.json and args.seconds == part.seconds - GRACE and args.shapes == "tiny"
            found.update(args.parts)
    assert found == set(gpu.PARTS)
    for file in conductor.GPU_TESTS:
        assert (conductor.ROOT / file).is_file()


# The conductor, with programs that take no time


def program(name: str, code: str, seconds: float = 20.0, **options: object) -> Part:
    return Part(name, [sys.executable, "-S", "-c", code], seconds, **options)  # type: ignore[arg-type]


TITLE = json.dumps({"title": "A", "columns": ["case", "ms"]})
ROW = json.dumps({"cells": ["one", "1.00"]})


@pytest.mark.slow
def test_what_was_measured_before_a_crash_or_the_limit_is_kept(tmp_path: Path) -> None:
    begin = f"print({TITLE!r}); print({ROW!r}, flush=True); "
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    read = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    hang = (
        f"import subprocess, sys, time; there = open({str(fifo)!r}, 'w'); there.write('x'); there.flush(); "
        "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(1000)'], stdout=there); "
        "time.sleep(1000)"
    )
    chosen = [
        program("good", begin),
        program("killed", begin + "import os; os.abort()"),
        program("hangs", begin + hang, 5.0),
        program("half", begin + "print('{\"cells\": [', end=''); raise SystemExit('no more')"),
        program("absent", "", missing="vLLM is not installed"),
        program("last", begin + f"print({json.dumps({'error': 'two: off by 3'})!r}); raise SystemExit(1)"),
    ]
    page = tmp_path / "deep" / "gpu.md"
    assert conduct(chosen, 100, page, "H100") == 1
    text = page.read_text()
    assert text.startswith("# H100\n") and text.count("### A\n") == 5 and text.count("| one | 1.00 |") == 5
    rows = dict(line.strip("| ").split(" | ")[::2] for line in text.splitlines()[4 : 4 + len(chosen)])
    assert rows["good"] == "complete" and rows["last"] == "something failed, see below"
    assert rows["killed"].startswith("ended with -6") and rows["hangs"] == "ended after 5 s, its limit"
    assert rows["half"].startswith("failed: no more") and str(tmp_path) in rows["half"]
    assert rows["absent"] == "not run: vLLM is not installed"
    assert "- failed: two: off by 3" in text
    assert os.read(read, 9) == b"x" and os.read(read, 9) == b"", "a process that it has started is left"
    os.close(read)
    assert conduct([chosen[0], chosen[4]], 100, page, "H100") == 0


def test_parts_for_which_no_time_is_left_do_not_run(tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 30.0
        return now[0]

    found = list(run_all([program(name, "") for name in "abcd"], 80, tmp_path, clock))
    assert [outcome.note for outcome in found] == ["", "", *["not run: the time is over"] * 2]
    assert not any(outcome.failed for outcome in found)
    page = report("H100", found[:1], [outcome.part for outcome in found[1:]])
    assert "| b | | to come |" in page and "| a | 0 | complete |" in page


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('no CUDA device: nothing was measured', file=sys.stderr); sys.exit(2)"
    assert conduct([program("checks", code), program("steps", "")], 100, tmp_path / "gpu.md", "none") == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_vllm_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {part.name: part for part in parts()}
    absent = importlib.util.find_spec("vllm") is None
    assert bool(found["vllm"].missing) == absent and not found["engine"].missing
    assert not Outcome(found["vllm"]._replace(missing="absent"), [], "not run: absent", 0).failed


def test_the_tests_outcomes_are_counted_also_if_they_did_not_end() -> None:
    text = "tests/a.py::test_x[1 - b] PASSED [ 50%]\ntests/a.py::test_y FAILED [75%]\ntests/a.py::test_z PASS"
    assert summary_of_tests(text)[1:] == [
        {"cells": ["failed", "1"]},
        {"cells": ["passed", "1"]},
        {"error": "tests/a.py::test_y"},
    ]
    assert summary_of_tests("") == [{"title": "Tests that need a GPU", "columns": ["outcome", "tests"]}]


# Sheets


def test_rows_after_the_deadline_are_not_measured() -> None:
    now = iter(range(100))
    rows = [Row((str(i),), lambda: ["1"]) for i in range(5)]
    found = list(measured([Sheet("A", ("case", "ms"), rows)] * 2, 2, lambda: next(now)))
    assert [entry["cells"][0] for entry in found if "cells" in entry] == ["0", "1", "2"]
    assert "the time is over" in found[-1]["error"]


def test_what_a_sheet_needs_may_fail_too() -> None:
    def rows():  # type: ignore[no-untyped-def]
        yield Row(("a",), lambda: ["1"])
        raise MemoryError("too large")

    def wrong() -> list[str]:
        raise Wrong("off by 2")

    sheets = [Sheet("A", ("case", "ms"), rows()), Sheet("B", ("case", "ms"), [Row(("b",), wrong)])]
    text = "\n".join(markdown(measured(sheets)))
    assert "- failed: MemoryError: too large\n" in text and "- failed: b: off by 2\n" in text
    assert (
        text.index("| a | 1 |")
        < text.index("MemoryError")
        < text.index("### B")
        < text.index("| b | failed |")
    )


CELLS = st.lists(st.text(st.characters(exclude_categories=["C", "Z"])), min_size=1, max_size=4)


@given(st.lists(st.tuples(CELLS, st.booleans()), max_size=5), st.integers(0, 400))
def test_entries_survive_being_cut_anywhere(rows: list[tuple[list[str], bool]], cut: int) -> None:
    entries = [{"cells": cells} if is_row else {"error": " ".join(cells)} for cells, is_row in rows]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    assert read_entries(text) == entries
    assert read_entries(text[:cut]) == entries[: text[:cut].count("\n")]
    for line in markdown([{"title": "A", "columns": ["a", "b", "c", "d"]}, *entries]):
        assert not line.startswith("| ") or len(line.replace("\\|", "").split("|")) == 6


def test_a_time_far_above_its_prediction_is_bold() -> None:
    assert against(1e-3, 1e-3, 1e-3) == ("1.00", "1.00", "1.00")
    assert against(2e-6, 1e-6, 1e-6) == ("2.0", "1.0", "**2.00**")
    assert against(2e-6, None, 1e-6) == ("2.0", "", "")


# Engines


@pytest.mark.slow
def test_the_engine_serves_random_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gpu_engines.SETTINGS["aioengine"], "kv_cache_memory", "8MiB")
    works = tuple(work._replace(requests=2, prompt=8, output=2) for work in gpu_engines.WORKS)
    monkeypatch.setattr(gpu_engines, "WORKS", works)
    arguments = ["aioengine", "--shapes", "tiny", "--layers", "2", "--home", str(tmp_path)]
    assert gpu_engines.main(arguments) == 0
    entries = read_entries(capsys.readouterr().out)
    assert [entry["cells"][0] for entry in entries[1:]] == [work.title for work in works]
    monkeypatch.setattr(gpu_engines, "WORKERS", tmp_path)
    assert gpu_engines.main(arguments) == 1  # there is no such program
    assert "ended with 2" in read_entries(capsys.readouterr().out)[-1]["error"]
