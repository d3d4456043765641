"""Commands of the lab that run the live engine: ``calibrate`` makes a cost model of this machine, and
``validate`` compares simulation with the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aioengine.cli.flags import DEFAULT_MODEL, CommonFlags, Given
from aioengine.cli.lab.flags import Floats, make_experiment
from aioengine.cli.process import EXIT_FAILED
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set, given
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from aioengine.lab.calibration.validate import Validation

DEFAULT_PRESET = "smollm2-135m-cpu"


LIVE = FieldsOf(EngineConfig, only=("dtype", "device", "quantization", "tensor_parallel_size"))


@flag_set("Engine", 5, LIVE)
class LiveFlags(Flags):
    model: str = DEFAULT_MODEL
    """Model folder, GGUF file, Hub id, or smollm2-135m (the default)."""


def calibrate(
    *,
    out: Given = Path("costs.json"),
    name: str | None = None,
    live: LiveFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Time the live engine for some minutes, and write a cost model for --preset.

    No other program should run on the machine meanwhile.

    Args:
        out: File for the cost model (costs.json).
        name: Name of the cost model; by default that of its file.
    """
    from aioengine.cli.progress import progress
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    from aioengine.cli.loop import run
    from aioengine.lab.calibration.calibrate import calibrate_async

    with progress("calibrating") as show:
        costs = run(calibrate_async(out=out, name=name, progress=show, **given(live or LiveFlags())))
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


def validate(
    *,
    flags: ValidateFlags | None = None,
    live: LiveFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Run the same workload live and simulated, and print the differences.

    It takes some minutes, ten with --calibrate. No other program should run on the machine meanwhile.
    """
    flags = flags or ValidateFlags()
    from aioengine.cli.progress import progress
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    from aioengine.cli.loop import run
    from aioengine.lab.calibration.validate import validate_async, validation_experiment

    if flags.calibrate is not None and flags.preset is not None:
        raise ConfigError("--calibrate makes the cost model, so --preset has no effect: give one of them")
    preset = flags.preset or DEFAULT_PRESET
    loads = [0.4, 0.8] if flags.loads is None else flags.loads
    if flags.experiment is not None:
        own = {"seed": flags.seed, "preset": preset}
        experiment = make_experiment(flags.experiment, None, None, own)
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
                **given(live or LiveFlags()),
            )
        )
    _print_validation(found)
    if found.worst > flags.max_error:
        print(f"aioengine: off by {found.worst:.1%}, more than --max-error allows", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _print_validation(found: Validation) -> None:
    from aioengine.cli.tables import print_table
    from aioengine.lab.calibration.probe import DISTURBED

    columns = ("load", "figure", ">live", ">simulated", ">error", ">steps as live")
    left = [error for one in found.comparisons for error in one.error_as_live.values()]
    rows = [
        (load, metric, f"{live:.4g}", f"{simulated:.4g}", f"{error:+.1%}", f"{rest:+.1%}")
        for (load, metric, live, simulated, error), rest in zip(found.rows(), left, strict=True)
    ]
    print_table(columns, rows, f"{found.preset}: live and simulated")
    steps = ", ".join(f"{one.step_error:+.1%} at {one.load}" for one in found.comparisons)
    print(f"error of the steps' time: {steps}; the last column is the error without it")
    if found.rounds:
        print(f"rounds of the calibration: {found.rounds}")
    waited = max(share for one in found.comparisons for share in one.waited)
    if waited > DISTURBED:
        print(
            f"aioengine: in a live run, steps waited for processors for {waited:.0%} of their time: other "
            "programs run; end them, and validate again",
            file=sys.stderr,
        )
