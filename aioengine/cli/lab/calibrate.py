"""``aioengine lab calibrate``: makes a cost model of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.cli.flags import DEFAULT_MODEL
from aioengine.config import DType
from aioengine.model.spec import Quantization

if TYPE_CHECKING:
    from aioengine.lab.costs.model import CostModel


def calibrate(
    *,
    model: str = DEFAULT_MODEL,
    out: Annotated[Path, Parameter(show_default=False)] = Path("costs.json"),
    name: str | None = None,
    dtype: DType = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quantization: Quantization = "none",
    tensor_parallel_size: int = 1,
    common: CommonFlags | None = None,
) -> int:
    """Time the live engine for some minutes, and write a cost model for --preset.

    No other program should run on the machine meanwhile.

    Args:
        model: Model folder, GGUF file, Hub id, or smollm2-135m (the default).
        out: File for the cost model (costs.json).
        name: Name of the cost model; by default that of its file.
        dtype: Compute dtype.
        device: Device that runs the model.
        quantization: Form in which the weights are kept.
        tensor_parallel_size: Number of GPUs, or of processes on a CPU, that share every layer.
    """
    from aioengine.cli.progress import progress
    from aioengine.lab.workload.extra import check_extra

    check_extra()
    from aioengine.cli.loop import run
    from aioengine.lab.calibration.calibrate import calibrate_async

    with progress("calibrating") as show:
        costs = run(
            calibrate_async(
                model,
                out,
                name=name,
                dtype=dtype,
                device=device,
                quantization=quantization,
                tensor_parallel_size=tensor_parallel_size,
                progress=show,
            )
        )
    _print(costs)
    print(f"cost model: {out}")
    return 0


def _print(costs: CostModel) -> None:
    """Print how well the cost model fits the timings."""
    print(f"{costs.name}: {costs.source}")
    if costs.fit is not None:
        median, p90 = costs.fit.median_error, costs.fit.p90_error
        print(f"steps: half of them fitted within {median:.1%}, 90% within {p90:.1%}")
    for stage, what in ((costs.disk, "load from disk"), (costs.slot, "copy into a slot")):
        print(f"{what}: {stage.latency * 1e3:.3g} ms + {stage.bandwidth / 1e6:,.0f} MB a second")
