"""dLoRA: what an adapter gains that is merged into the base model's weights."""

from __future__ import annotations

from rich.table import Table

from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.costs.roofline import A10G, H100_SXM, DeviceFigures
from aioengine.lab.costs.steps import StepShape, StepTimes
from aioengine.model.spec import DTYPE_BYTES
from benchmarks.policies.papers.runs import Lab

CONTEXT, RANK = 500, 16
DEVICES = {"llama3-8b-h100": H100_SXM, "llama3-8b-a10g": A10G}


def seconds(costs: CostModel, tokens: int, adapters: list[int]) -> float:
    """Return the seconds of a step that decodes ``tokens``; ``adapters`` are the tokens of each adapter."""
    shape = StepShape(tokens, tokens * CONTEXT, 0, 0, tokens, tuple((RANK, count) for count in adapters))
    return StepTimes(costs.steps)(shape) + costs.step_overhead


def switch_seconds(costs: CostModel, device: DeviceFigures) -> float:
    """Return the seconds to merge an adapter: all weights of the layers' linears are read and written."""
    spec = costs.spec
    weights = spec.num_parameters() - 2 * spec.vocab_size * spec.hidden_size
    return 2 * weights * DTYPE_BYTES[spec.dtype] / (device.bandwidth * device.weights_achieved)


def dlora(lab: Lab) -> Table:
    """dLoRA, OSDI'24: up to 1.8 times lower average latency than S-LoRA, by merging an adapter while it has
    most of the requests.

    An engine here merges beside the steps, and others do not wait for that. The paper's merged mode, in which
    they do, is worked out on the cost model: a batch of decoding requests of
    which a share is for one adapter and the others are for one each. Merged, only that adapter's requests
    run, without any cost for LoRA; unmerged, all run. Both ways the requests that do not fit wait.
    """
    batches = [32] if lab.quick else [8, 32, 128]
    shares = (1.0, 0.9, 0.8, 0.6)
    table = Table(title="dLoRA: tokens a second of a merged adapter, against all adapters unmerged")
    for column in (
        "cost model",
        "requests",
        *(f"share {share:.0%}" for share in shares),
        "pays from",
        "merge, ms",
    ):
        table.add_column(column, justify="left" if column == "cost model" else "right")
    for name, device in DEVICES.items():
        costs = load_costs(name)
        for batch in batches:
            gains = {share: gain(costs, batch, share) for share in shares}
            pays = next((n for n in range(1, batch + 1) if gain(costs, batch, n / batch) >= 1), None)
            table.add_row(
                name,
                f"{batch}",
                *(f"{gains[share]:.2f}" for share in shares),
                "never" if pays is None else f"{pays / batch:.0%}",
                f"{1e3 * switch_seconds(costs, device):.0f}",
            )
        table.add_section()
    return table


def gain(costs: CostModel, batch: int, share: float) -> float:
    """Return the merged mode's tokens a second over those of the unmerged mode."""
    hot = max(round(batch * share), 1)
    unmerged = batch / seconds(costs, batch, [hot, *([1] * (batch - hot))])
    return hot / seconds(costs, hot, []) / unmerged
