"""The policy lab: policies tried on traces in simulated time, with the engine that serves.

A name is imported when it is first used (PEP 562): importing the lab alone needs nothing of its extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from aioengine.lab.workload.extra import needs_extra

if TYPE_CHECKING:
    from aioengine.lab.analysis.fairness import by_client as by_client
    from aioengine.lab.analysis.fairness import jain as jain
    from aioengine.lab.analysis.fairness import service_gap as service_gap
    from aioengine.lab.analysis.summary import summarize as summarize
    from aioengine.lab.calibration.calibrate import calibrate as calibrate
    from aioengine.lab.calibration.validate import validate as validate
    from aioengine.lab.costs.model import CostModel as CostModel
    from aioengine.lab.costs.presets import available_presets as available_presets
    from aioengine.lab.costs.presets import load_costs as load_costs
    from aioengine.lab.report.compare_page import write_compare_report as write_compare_report
    from aioengine.lab.report.run_page import write_report as write_report
    from aioengine.lab.runs.comparison import Comparison as Comparison
    from aioengine.lab.runs.comparison import compare as compare
    from aioengine.lab.runs.comparison import estimates as estimates
    from aioengine.lab.runs.comparison import load_results as load_results
    from aioengine.lab.runs.experiment import Experiment as Experiment
    from aioengine.lab.runs.rows import Frames as Frames
    from aioengine.lab.runs.rows import load_frames as load_frames
    from aioengine.lab.runs.simulate import run as run
    from aioengine.lab.workload.spec import WorkloadSpec as WorkloadSpec

_HOMES = {
    "analysis.fairness": ("by_client", "jain", "service_gap"),
    "analysis.summary": ("summarize",),
    "calibration.calibrate": ("calibrate",),
    "calibration.validate": ("validate",),
    "costs.model": ("CostModel",),
    "costs.presets": ("available_presets", "load_costs"),
    "report.compare_page": ("write_compare_report",),
    "report.run_page": ("write_report",),
    "runs.comparison": ("Comparison", "compare", "estimates", "load_results"),
    "runs.experiment": ("Experiment",),
    "runs.rows": ("Frames", "load_frames"),
    "runs.simulate": ("run",),
    "workload.spec": ("WorkloadSpec",),
}
"""The names that each module defines, as the imports above have them."""


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            with needs_extra():
                return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
