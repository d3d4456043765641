"""A study that runs as it is."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from aioengine.cli.main import main
from aioengine.lab.policy_check.check import check_policy_contract
from aioengine.lab.workload.spec import read_workload
from aioengine.schedulers import load_policy


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
