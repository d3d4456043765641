"""The lab's commands as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.cli_programs import run_script

from aioengine.cli.main import main
from aioengine.lab import Experiment

SMALL = ["--arrivals", "poisson:rate=20", "--limit", "20", "--adapters", "5", "--output-tokens", "8"]
SYSTEM = ["--cpu-loras", "4"]


@pytest.mark.slow
def test_a_comparison_of_several_routers_puts_them_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = ["--replicas", "2", "--router", "affinity,least_loaded", "--slots", "2"]
    out = tmp_path / "out"
    assert main(["lab", "compare", *SMALL, *SYSTEM, *fleet, "--seeds", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "affinity" in said and "least_loaded" in said
    assert (out / "comparison.json").is_file()


@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vl_convert", reason="of the extra")
    out = tmp_path / "out"
    assert main(["lab", "run", *SMALL, *SYSTEM, "--slots", "2", "--policy", "vtc", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if "requests finished" in line)
    assert line.split()[-1] == "20" and f"report: {out / 'report.html'}" in said
    assert json.loads((out / "summary.json").read_text())["requests_finished"] == 20


def test_a_run_says_why_requests_were_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--slots", "2", "--deadline", "1e-6", "--no-report", "--out"]
    assert main(["lab", "run", *SMALL, *SYSTEM, *flags, str(tmp_path / "out")]) == 0
    assert "aioengine: not all requests were served: 20 DeadlineExceeded" in capsys.readouterr().err


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert main(["lab", "run", *SMALL, *SYSTEM, "--slots", "2", "--no-report", "--out", out]) == 0
    file = ["--experiment", f"{out}/experiment.json"]
    assert main(["lab", "run", *file, "--slots", "3", "--scale", "2", "--no-report", "--out", out]) == 0
    found = Experiment.read(f"{out}/experiment.json")
    assert (found.slots, found.workload.scale, found.workload.limit) == (3, 2.0, 20)
    assert not (tmp_path / "out" / "report.html").exists()


DEADLY = """
import os

from aioengine.schedulers.policies.fcfs import FCFS


class Deadly(FCFS):
    def schedule(self, view):
        os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vl_convert", reason="of the extra")
    out, again = tmp_path / "out", tmp_path / "again"
    (tmp_path / "deadly.py").write_text(DEADLY)
    policies = [
        "--policy",
        "vllm+lru,vtc:input_weight=1,output_weight=2",
        "--policy",
        f"{tmp_path}/deadly.py:Deadly",
    ]
    grid = [*policies, "--slots", "2,3", "--seeds", "1", "--jobs", "2"]
    assert main(["lab", "compare", *grid, *SMALL, *SYSTEM, "--out", str(out)]) == 1
    heard = capsys.readouterr()
    assert heard.err.count("failed: its process was killed by signal 9") == 2
    assert "3 slots: by time to first token, p99" in heard.out
    file = ["--experiment", str(out / "comparison.json"), "--policy", "vllm+lru"]
    file += ["--rank-by", "latency_seconds.mean"]
    assert main(["lab", "compare", *file, "--jobs", "1", "--out", str(again)]) == 0
    found = json.loads((again / "comparison.json").read_text())["comparison"]
    assert (found["policies"], found["slots"], found["seeds"]) == (["vllm+lru"], [2, 3], [0])
    assert "2 slots: by whole answer, mean" in (again / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run"], "poisson:rate=2"),
        (["run", *SMALL, "--start-seconds", "1"], "give"),
        (["run", *SMALL, "--on-too-long", "ignore"], "ignore"),
        (["rnu"], "run"),
        (["run", *SMALL, "--slots", "0"], "slots=0"),
        (["run", *SMALL, "--popularty", "uniform"], "--popularity"),
        (["compare", *SMALL, "--slots", "4,x"], "4,x"),
        (["compare", *SMALL, "--policy", "fcfs,"], "--policy"),
        (["compare", *SMALL, "--seeds", "0"], "for --seeds. Must be >= 1"),
        (["compare", *SMALL, "--jobs", "0"], "for --jobs. Must be >= 1"),
        (["validate", "--calibrate", "c.json", "--preset", "smollm2-135m-cpu"], "--preset has no effect"),
        (["validate", "--calibrate", "no/c.json"], "there is no folder no"),
    ],
)
@pytest.mark.slow
def test_what_is_refused_says_so_in_one_line(
    arguments: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["lab", *arguments]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.startswith("aioengine: ") and error.count("\n") == 1


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("")
    for command in ("run", "compare"):
        assert main(["lab", command, *SMALL, *SYSTEM, "--slots", "2", "--out", str(tmp_path)]) == 2
        assert "use another folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_without_the_extra() -> None:
    script = (
        "import sys; sys.modules['polars'] = None\n"
        "from aioengine.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = run_script(script, "lab", "run", *SMALL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'aioengine[lab]'" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.slow
def test_ctrl_c_ends_a_comparison_and_its_workers(tmp_path: Path) -> None:
    """In a session of its own, so that the signal reaches all its processes, as at a terminal."""
    many = [argument if argument != "20" else "1000000" for argument in SMALL]
    command = [sys.executable, "-m", "aioengine", "lab", "compare", *many, *SYSTEM]
    command += ["--jobs", "2", "--slots", "2", "--out", str(tmp_path / "out")]
    program = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        runs = tmp_path / "out" / "runs"
        until = time.monotonic() + 60
        while len(list(runs.glob("*/requests.csv"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)  # its workers are other processes: there is nothing to wait on
        workers = psutil.Process(program.pid).children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)
        _, error = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == 130
    said = [line for line in error.splitlines() if not line.startswith("comparing ")]  # on a slow machine
    assert said == ["aioengine: interrupted"]
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=10)
    # Where nobody collects orphans, what has ended stays a zombie.
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in alive)


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="of the extra")
    script = Path(__file__).resolve().parents[2] / "examples" / "lab_notebook.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "200 finished" in done.stdout and (tmp_path / "vllm" / "report.html").exists()
