"""Commands of the lab that run the live engine: ``calibrate`` makes a cost model of this machine, and
``validate`` compares simulation with the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from aioengine.cli.flags import DEFAULT_MODEL, Count, Given
from aioengine.cli.lab.flags import Floats
from aioengine.cli.loop import run
from aioengine.cli.process import EXIT_FAILED
from aioengine.cli.progress import progress
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set, given
from aioengine.cli.tables import print_table
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError

DEFAULT_PRESET = "smollm2-135m-cpu"


@flag_set(
    "Engine", 5, FieldsOf(EngineConfig, only=("dtype", "device", "quantization", "tensor_parallel_size"))
)
class LiveFlags(Flags):
    model: str = DEFAULT_MODEL
    """Model folder, GGUF file, Hub id, or smollm2-135m (the default)."""


def calibrate(*, out: Given = Path("costs.json"), live: LiveFlags = LiveFlags()) -> int:
    """Time the live engine for some minutes, and write a cost model for --preset.

    No other program should run on the machine meanwhile.

    Args:
        out: File for the cost model (costs.json).
    """
    from aioengine.lab.calibration.calibrate import calibrate_async

    with progress("calibrating") as show:
        costs = run(calibrate_async(out=out, progress=show, **given(live)))
    print(f"{costs.name}: {costs.source}")
    if costs.fit is not None:
        median, p90 = costs.fit.median_error, costs.fit.p90_error
        print(f"steps: half of them fitted within {median:.1%}, 90% within {p90:.1%}")
    for stage, what in ((costs.disk, "load from disk"), (costs.slot, "copy into a slot")):
        print(f"{what}: {stage.latency * 1e3:.3g} ms + {stage.bandwidth / 1e6:,.0f} MB a second")
    print(f"cost model: {out}")
    return 0


def validate(
    *,
    preset: str | None = None,
    calibrate: Given | None = None,
    loads: Floats | None = None,
    repeats: Count = 3,
    max_error: float = 0.1,
    live: LiveFlags = LiveFlags(),
) -> int:
    """Run the same workload live and simulated, and print the differences.

    It takes some minutes, ten with --calibrate. No other program should run on the machine meanwhile.

    Args:
        preset: Cost model of this machine: a file of lab calibrate, or a preset (smollm2-135m-cpu).
        calibrate: Make the cost model meanwhile, in turns with the live runs, and write it to this file.
        loads: Loads, as shares of the engine's capacity (0.4,0.8).
        repeats: Runs of each load, each with a different workload; figures are over all of them.
        max_error: Exit with 1 if the error of a figure is larger than this.
    """
    from aioengine.lab.calibration.validate import validate_async, validation_experiment

    if calibrate is not None and preset is not None:
        raise ConfigError("--calibrate makes the cost model, so --preset has no effect: give one of them")
    experiment = validation_experiment(preset or DEFAULT_PRESET)
    options: dict[str, Any] = {"loads": loads or (0.4, 0.8), "repeats": repeats, **given(live)}
    with progress("validating") as show:
        found = run(validate_async(experiment, calibrate=calibrate, progress=show, **options))
    rows = []
    for one in found:
        for name, error in one.errors.items():
            figures = (f"{getattr(side, name):.4g}" for side in (one.live, one.simulated))
            rows.append((one.load, name, *figures, f"{error:+.1%}"))
    title = f"{calibrate or experiment.preset}: live and simulated"
    print_table(("load", "figure", ">live", ">simulated", ">error"), rows, title)
    worst = max(abs(error) for one in found for error in one.errors.values())
    if worst > max_error:
        print(f"aioengine: off by {worst:.1%}, more than --max-error allows", file=sys.stderr)
        return EXIT_FAILED
    return 0
