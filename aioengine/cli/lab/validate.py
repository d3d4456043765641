"""``aioengine lab validate``: compares simulation with the live engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from aioengine.cli.common import CommonFlags
from aioengine.cli.flags import DEFAULT_MODEL
from aioengine.cli.lab.flags import SystemFlags, WorkloadFlags, make_experiment, numbers
from aioengine.cli.process import EXIT_FAILED
from aioengine.config import DType
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from aioengine.lab.calibration.validate import Validation

DEFAULT_PRESET = "smollm2-135m-cpu"
_VALIDATE = Group("Validation", sort_key=4)


@Parameter(name="*", group=_VALIDATE)
@dataclass(frozen=True, kw_only=True)
class ValidateFlags:
    preset: str | None = None
    """Cost model of this machine: a file of lab calibrate, or a preset (smollm2-135m-cpu)."""
    calibrate: Annotated[Path | None, Parameter(show_default=False)] = None
    """Make the cost model meanwhile, in turns with the live runs, and write it to this file."""
    model: str = DEFAULT_MODEL
    """The model that the cost model was calibrated with."""
    loads: Annotated[str, Parameter(metavar="A,B,...")] = "0.4,0.8"
    """Loads, as shares of the engine's capacity; "" keeps an experiment's arrivals."""
    repeats: int = 3
    """Runs of each load, each with a different workload; figures are over all of them."""
    max_error: float = 0.1
    """Exit with 1 if the error of a figure is larger than this."""
    experiment: Path | None = None
    """Use workload and engine of this experiment.json, instead of small ones."""
    seed: int | None = None
    """Seed of the workload."""
    dtype: DType = "auto"
    """Compute dtype."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that runs the model."""


def validate(*, flags: ValidateFlags | None = None, common: CommonFlags | None = None) -> int:
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
    loads = (numbers("--loads", [flags.loads], float) or []) if flags.loads else []
    if flags.experiment is None:
        if not loads:
            raise ConfigError("--loads '': needs the arrivals of an --experiment")
        experiment = validation_experiment(preset, seed=flags.seed or 0)
    else:
        own = {"seed": flags.seed, "preset": preset}
        experiment = make_experiment(flags.experiment, WorkloadFlags(), SystemFlags(), own)
    with progress("validating") as show:
        found = run(
            validate_async(
                experiment,
                flags.model,
                loads=loads,
                repeats=flags.repeats,
                calibrate=flags.calibrate,
                dtype=flags.dtype,
                device=flags.device,
                progress=show,
            )
        )
    _print(found)
    if found.worst > flags.max_error:
        print(f"aioengine: off by {found.worst:.1%}, more than --max-error allows", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _print(found: Validation) -> None:
    from aioengine.cli.tables import new_table, output_console
    from aioengine.lab.calibration.probe import DISTURBED

    console = output_console()
    columns = ("load", "figure", ">live", ">simulated", ">error", ">steps as live")
    table = new_table(console, *columns, title=f"{found.preset}: live and simulated")
    left = [error for one in found.comparisons for error in one.error_as_live.values()]
    for (load, metric, live, simulated, error), rest in zip(found.rows(), left, strict=True):
        table.add_row(load, metric, f"{live:.4g}", f"{simulated:.4g}", f"{error:+.1%}", f"{rest:+.1%}")
    console.print(table)
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
