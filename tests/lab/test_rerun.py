"""A run again from its folder alone, and a study that runs as it is."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from aioengine.cli.main import main
from aioengine.lab.policy_check.check import check_policy_contract
from aioengine.lab.workload.spec import read_workload
from aioengine.schedulers import load_policy

POLICY = """
from aioengine.schedulers.policies.fcfs import FCFS

class Mine(FCFS):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run with a trace and a policy in a file."""
    trace = tmp_path / "t.jsonl"
    rows = ({"time": index * 0.1, "prompt_tokens": 50, "output_tokens": 10} for index in range(20))
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(POLICY)
    out = tmp_path / "run"
    flags = ["--trace", str(trace), "--policy", f"{tmp_path / 'mine.py'}:Mine", "--adapters", "3"]
    assert main(["lab", "run", *flags, "--out", str(out), "--no-report"]) == 0
    return out


def test_the_same_bytes_come_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["lab", "rerun", str(folder)]) == 0
    assert "the same bytes" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "it is only read"
    assert main(["lab", "rerun", str(folder), "--out", str(folder.parent / "again")]) == 0
    assert (folder.parent / "again" / "requests.csv").read_bytes() == before["requests.csv"]


def test_what_has_changed_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = folder.parent / "t.jsonl"
    trace.write_text(trace.read_text().replace('"output_tokens": 10', '"output_tokens": 11'))
    policy = folder.parent / "mine.py"
    policy.write_text(policy.read_text() + "# another\n")
    found = json.loads((folder / "experiment.json").read_text())
    found["provenance"]["versions"]["polars"] = "0.0.1"
    (folder / "experiment.json").write_text(json.dumps(found))
    assert main(["lab", "rerun", str(folder)]) == 1
    said = capsys.readouterr()
    for name in ("workload_sha256", "policy_sha256", "versions.polars: was 0.0.1"):
        assert f"changed: {name}" in said.out
    assert "requests.csv: line 2 was" in said.err


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert main(["lab", "rerun", str(tmp_path)]) == 2


@pytest.mark.slow
def test_a_new_study_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vl_convert", reason="of the extra")
    study = tmp_path / "my_study"
    assert main(["lab", "new", str(study)]) == 0
    assert read_workload(study / "workload.toml").adapters == 50
    found = check_policy_contract(lambda: load_policy(f"{study / 'policy.py'}:MyPolicy"), runs=1, turns=15)
    assert found.sound, found.broken
    script = runpy.run_path(str(study / "compare.py"))
    script["main"](requests=8, seeds=1)
    assert (study / "results" / "report.html").is_file()
    monkeypatch.chdir(study)
    scope: dict[str, object] = {}
    for cell in json.loads((study / "notebook.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    assert main(["lab", "new", str(study)]) == 2, "it has files already"
