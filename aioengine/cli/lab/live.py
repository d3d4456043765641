"""Commands of the lab that run the live engine: ``calibrate`` makes a cost model of this machine, and
``validate`` compares simulation with the engine."""

from __future__ import annotations

import sys
from pathlib import Path

from aioengine.cli.flags import DEFAULT_MODEL, Given
from aioengine.cli.lab.flags import Floats, make_experiment
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


@flag_set("Validation", 4)
class ValidateFlags(Flags):
    preset: str | None = None
    """Cost model of this machine: a file of lab calibrate, or a preset (smollm2-135m-cpu)."""
    calibrate: Given | None = None
    """Make the cost model meanwhile, in turns with the live runs, and write it to this file."""
    loads: Floats | None = None
    """Loads, as shares of the engine's capacity; "" keeps an experiment's arrivals (0.4,0.8)."""
    repeats: int = 3
    """Runs of each load, each with a different workload; figures are over all of them."""
    max_error: float = 0.1
    """Exit with 1 if the error of a figure is larger than this."""
    experiment: Path | None = None
    """Use workload and engine of this experiment.json, instead of small ones."""
    seed: int | None = None
    """Seed of the workload."""


def validate(*, flags: ValidateFlags = ValidateFlags(), live: LiveFlags = LiveFlags()) -> int:
    """Run the same workload live and simulated, and print the differences.

    It takes some minutes, ten with --calibrate. No other program should run on the machine meanwhile.
    """
    from aioengine.lab.calibration.validate import validate_async, validation_experiment

    if flags.calibrate is not None and flags.preset is not None:
        raise ConfigError("--calibrate makes the cost model, so --preset has no effect: give one of them")
    preset = flags.preset or DEFAULT_PRESET
    loads = [0.4, 0.8] if flags.loads is None else flags.loads
    if flags.experiment is not None:
        experiment = make_experiment(flags.experiment, flags, preset=preset)
    elif loads:
        experiment = validation_experiment(preset, seed=flags.seed or 0)
    else:
        raise ConfigError("--loads '': needs the arrivals of an --experiment")
    with progress("validating") as show:
        found = run(
            validate_async(
                experiment,
                loads=loads,
                repeats=flags.repeats,
                calibrate=flags.calibrate,
                progress=show,
                **given(live),
            )
        )
    rows = []
    for one in found:
        for name, error in one.errors.items():
            figures = (f"{getattr(side, name):.4g}" for side in (one.live, one.simulated))
            rows.append((one.load, name, *figures, f"{error:+.1%}"))
    title = f"{flags.calibrate or preset}: live and simulated"
    print_table(("load", "figure", ">live", ">simulated", ">error"), rows, title)
    worst = max(abs(error) for one in found for error in one.errors.values())
    if worst > flags.max_error:
        print(f"aioengine: off by {worst:.1%}, more than --max-error allows", file=sys.stderr)
        return EXIT_FAILED
    return 0
