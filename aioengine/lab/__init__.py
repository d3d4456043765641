"""The policy lab: policies tried on traces in simulated time, with the engine that serves.

A name is imported when it is first used (PEP 562): importing the lab alone needs nothing of its extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioengine.lab.analysis.fairness import by_client, jain, service_gap
    from aioengine.lab.analysis.summary import summarize
    from aioengine.lab.calibration.calibrate import calibrate
    from aioengine.lab.calibration.validate import validate
    from aioengine.lab.costs.model import CostModel
    from aioengine.lab.costs.presets import available_presets, load_costs
    from aioengine.lab.report.compare_page import write_compare_report
    from aioengine.lab.report.run_page import write_report
    from aioengine.lab.runs.comparison import Comparison, compare, estimates, load_results
    from aioengine.lab.runs.experiment import Experiment
    from aioengine.lab.runs.rows import Frames, load_frames
    from aioengine.lab.runs.simulate import run
    from aioengine.lab.workload.spec import WorkloadSpec

__all__ = [
    "Comparison",
    "CostModel",
    "Experiment",
    "Frames",
    "WorkloadSpec",
    "available_presets",
    "by_client",
    "calibrate",
    "compare",
    "estimates",
    "jain",
    "load_costs",
    "load_frames",
    "load_results",
    "run",
    "service_gap",
    "summarize",
    "validate",
    "write_compare_report",
    "write_report",
]

_HOMES = {
    "Comparison": "runs.comparison",
    "CostModel": "costs.model",
    "Experiment": "runs.experiment",
    "Frames": "runs.rows",
    "WorkloadSpec": "workload.spec",
    "available_presets": "costs.presets",
    "by_client": "analysis.fairness",
    "calibrate": "calibration.calibrate",
    "compare": "runs.comparison",
    "estimates": "runs.comparison",
    "jain": "analysis.fairness",
    "load_costs": "costs.presets",
    "load_frames": "runs.rows",
    "load_results": "runs.comparison",
    "run": "runs.simulate",
    "service_gap": "analysis.fairness",
    "summarize": "analysis.summary",
    "validate": "calibration.validate",
    "write_compare_report": "report.compare_page",
    "write_report": "report.run_page",
}
"""Name -> the module that defines it, as the imports above have it."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
