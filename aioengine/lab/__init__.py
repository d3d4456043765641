"""The policy lab: policies tried on traces in simulated time, with the engine that serves.

A name is imported when it is first used (PEP 562): importing the lab alone needs nothing of its extra.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioengine.lab.calibrate import calibrate
    from aioengine.lab.compare_report import write_compare_report
    from aioengine.lab.comparison import Comparison, compare, estimates, load_results
    from aioengine.lab.costs import CostModel
    from aioengine.lab.experiment import Experiment
    from aioengine.lab.fairness import by_client, jain, service_gap
    from aioengine.lab.frames import Frames, load_frames
    from aioengine.lab.presets import available_presets, load_costs
    from aioengine.lab.report import write_report
    from aioengine.lab.run import run
    from aioengine.lab.spec import WorkloadSpec
    from aioengine.lab.summary import summarize
    from aioengine.lab.validate import validate

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
    "Comparison": "comparison",
    "CostModel": "costs",
    "Experiment": "experiment",
    "Frames": "frames",
    "WorkloadSpec": "spec",
    "available_presets": "presets",
    "by_client": "fairness",
    "calibrate": "calibrate",
    "compare": "comparison",
    "estimates": "comparison",
    "jain": "fairness",
    "load_costs": "presets",
    "load_frames": "frames",
    "load_results": "comparison",
    "run": "run",
    "service_gap": "fairness",
    "summarize": "summary",
    "validate": "validate",
    "write_compare_report": "compare_report",
    "write_report": "report",
}
"""Name -> the module that defines it, as the imports above have it."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing the module "run" would put it in the place of the function.
        if not (isinstance(value, ModuleType) and name in _HOMES):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
