"""A folder to begin a study with: a policy, a workload, a comparison and a notebook, which run as they
are."""

from __future__ import annotations

import json
from pathlib import Path

from aioengine.errors import ConfigError

POLICY = '''\
"""The policy of this study: the shortest expected answers first. Change it."""

from __future__ import annotations

from aioengine.schedulers import RequestView, SchedulerPolicy, SchedulerView, compose
from aioengine.schedulers import Decision, Ordering, PolicyEvent


class ShortestFirst(Ordering):
    """Requests in order of what is left of them to compute."""

    starvation_bound = "none: shorter requests may come for ever"

    def key(self, request: RequestView, view: SchedulerView) -> float:
        return request.prompt_tokens + request.expected_tokens


class MyPolicy(SchedulerPolicy):
    """The ordering above, with the built-in parts for everything else."""

    starvation_bound = ShortestFirst.starvation_bound

    def __init__(self, max_wait: float = 1.0) -> None:
        self.inner = compose(order=ShortestFirst(), replace="gdsf", max_wait=max_wait)

    def schedule(self, view: SchedulerView) -> Decision:
        return self.inner.schedule(view)

    def on_event(self, event: PolicyEvent) -> None:
        self.inner.on_event(event)
'''
WORKLOAD = """\
# Fields: docs/lab-workloads.md. `aioengine lab workload workload.toml --plot` shows what this is.
arrivals = "gamma:rate=10,cv=3"
limit = 1000
adapters = 50
popularity = "zipf:1.0"
prompt_tokens = "lognormal:median=400,sigma=1.0,max=4096"
output_tokens = "lognormal:median=128,sigma=0.8,max=1024"
slo = "proportional:2+0.03"
"""
COMPARE = '''\
"""Compare the study's policy with others: `python compare.py`, or, to try it, `python compare.py 100 2`."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from aioengine import lab
from aioengine.lab.workload.files import read_workload

HERE = Path(__file__).resolve().parent
POLICIES = ["fcfs", "vllm+lru", f"{HERE / 'policy.py'}:MyPolicy"]


def main(requests: int = 1000, seeds: int = 5) -> None:
    workload = msgspec.structs.replace(read_workload(HERE / "workload.toml"), limit=requests)
    experiment = lab.Experiment(workload=workload, slots=8, cpu_loras=32)
    comparison = lab.Comparison(
        experiment=experiment,
        policies=list(POLICIES),
        slots=[4, 8],
        scales=[1.0],
        seeds=list(range(seeds)),
    )
    lab.compare(comparison, HERE / "results", jobs=2)
    print(lab.write_compare_report(HERE / "results"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
'''
README = """\
# {name}

| file | |
|---|---|
| `policy.py` | the policy; `aioengine policies check policy.py:MyPolicy` says what it breaks |
| `workload.toml` | the requests; `aioengine lab workload workload.toml --plot` shows it |
| `compare.py` | `python compare.py` compares the policy with others, over seeds: `results/report.html` |
| `notebook.ipynb` | looks at `results/` |

One run, with its figures: `aioengine lab run --experiment workload.toml --policy policy.py:MyPolicy --out
run`. The same again, or what has changed: `aioengine lab rerun run`.
"""
CELLS = (
    ("markdown", "# Results\n\nRun `python compare.py` first. Every row of `results` is a run."),
    (
        "code",
        "import polars as pl\n\nfrom aioengine import lab\n\nresults = lab.load_results('results')\nresults",
    ),
    (
        "code",
        "figures = ['ttft_seconds.p99', 'inter_token_seconds.mean', 'slo.in_time_share']\n"
        "results.group_by('policy', 'slots').agg(pl.col(figures).mean()).sort('slots', 'policy')",
    ),
    ("code", "lab.estimates(results)"),
)


def new_study(folder: str | Path) -> list[Path]:
    """Write a study into a folder that is not there yet, or empty; returns its files.

    Raises ConfigError if the folder has files, or cannot be written.
    """
    folder = Path(folder)
    files = {
        "policy.py": POLICY,
        "workload.toml": WORKLOAD,
        "compare.py": COMPARE,
        "README.md": README.format(name=folder.resolve().name),
        "notebook.ipynb": json.dumps(_notebook(), indent=1) + "\n",
    }
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: has files already; name a new one, or an empty one")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return [folder / name for name in files]


def _notebook() -> dict[str, object]:
    cells = []
    for index, (kind, text) in enumerate(CELLS):
        cell: dict[str, object] = {
            "cell_type": kind,
            "id": f"cell-{index}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
