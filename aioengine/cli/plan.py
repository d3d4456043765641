"""``aioengine plan``: what an engine would take, before it takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioengine.cli.common import CommonFlags
from aioengine.cli.flags import EngineFlags
from aioengine.errors import PolicyError

if TYPE_CHECKING:
    from aioengine.memory_plan import MemoryPlan


def plan(*, engine: EngineFlags | None = None, common: CommonFlags | None = None) -> int:
    """Print the memory that an engine with these settings needs, without reading weights.

    Exits with 2, naming the knob to turn, if it does not fit, or if --batch-invariant cannot be had.
    """
    from aioengine.cli.progress import load_progress
    from aioengine.memory_plan import plan_from_config
    from aioengine.model.coverage import planned_variance
    from aioengine.model.files.resolve import read_spec, resolve_model
    from aioengine.schedulers import load_policy

    config = (engine or EngineFlags()).engine_config()
    try:
        load_policy(config.policy)
    except ValueError as error:
        raise PolicyError(str(error)) from error
    with load_progress() as progress:
        found = plan_from_config(config, progress=progress)
        spec = read_spec(resolve_model(config.model), config.model_impl, config.quantization)
        variance = planned_variance(
            config, spec, device=found.device, dtype=found.dtype, lora_dtype=found.lora_dtype
        )
    _print(found, config.model, spec.ran_by, variance)
    return 0


def _print(found: MemoryPlan, model: str, ran_by: str, variance: str | None) -> None:
    from rich.table import Table

    from aioengine.checks import format_bytes
    from aioengine.cli.tables import box_for, output_console

    console = output_console()
    title = f"Memory plan: {model} on {found.device}"
    table = Table(title=title, title_justify="left", box=box_for(console))
    table.add_column("what")
    table.add_column("how")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")
    rows = found.rows()
    for index, (label, detail, size) in enumerate(rows):
        last = index == len(rows) - 1
        # A module's share is part of the slot pool's row, so it is set apart from what adds up.
        style = "bold" if last else "dim" if label.startswith("slot pool: ") else ""
        if last:
            table.add_section()
        table.add_row(label, detail, f"{size:,}", format_bytes(size), style=style)
    table.caption_justify = "left"
    table.caption = (
        f"one slot: {found.slot_bytes:,} bytes   longest request: {found.max_model_len:,} tokens   "
        f"KV cache: {found.num_blocks * found.block_size:,} tokens"
    )
    console.print(table)
    for rank, fixed, by_bytes in found.adapters_that_fit():
        line = f"adapters of rank {rank}: {fixed} in slots of one size, {by_bytes} "
        line += "at most" if found.shared else f"with slot_memory={format_bytes(found.slot_pool_bytes)}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"model: {ran_by}", highlight=False, soft_wrap=True)
    invariance = "on" if variance is None else f"off: {variance}"
    console.print(f"batch invariance {invariance}", highlight=False, soft_wrap=True)
