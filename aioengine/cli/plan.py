"""``aioengine plan``: shows the memory that an engine would take."""

from __future__ import annotations

from aioengine.checks import format_bytes
from aioengine.cli.flags import EngineFlags
from aioengine.cli.policies import check_named
from aioengine.cli.progress import load_progress
from aioengine.cli.tables import new_table, output_console
from aioengine.memory_plan import MemoryPlan, plan_memory, resolve_device, spec_from_config


def plan(*, engine: EngineFlags = EngineFlags()) -> int:
    """Print the memory that an engine with these settings needs, without reading weights.

    Exits with 2 and names the setting to change if it does not fit, or --batch-invariant is not possible.
    """
    from aioengine.model.coverage import planned_cpu_level, planned_variance

    config = engine.engine_config()
    check_named(config.policy)
    with load_progress() as progress:
        spec = spec_from_config(config, progress)
        found = plan_memory(spec, config, device=resolve_device(config.device))
        variance = planned_variance(
            config, spec, device=found.device, dtype=found.dtype, lora_dtype=found.lora_dtype
        )
    _print(found, config.model)
    print(f"model: {spec.ran_by}")
    print(f"batch invariance {'on' if variance is None else f'off: {variance}'}")
    if found.device == "cpu":
        print(f"CPU kernels: {planned_cpu_level()}")
    return 0


def _print(found: MemoryPlan, model: str) -> None:
    console = output_console()
    table = new_table(console, "what", "how", ">bytes", ">", title=f"Memory plan: {model} on {found.device}")
    *rows, total = found.rows()
    for label, detail, size in rows:
        # A module's share is part of the slot pool's row, so it is not among the rows that add up.
        style = "dim" if label.startswith("slot pool: ") else ""
        table.add_row(label, detail, f"{size:,}", format_bytes(size), style=style)
    table.add_section()
    table.add_row(total[0], total[1], f"{total[2]:,}", format_bytes(total[2]), style="bold")
    table.caption_justify = "left"
    table.caption = (
        f"one slot: {found.slot_bytes:,} bytes   longest request: {found.max_model_len:,} tokens   "
        f"KV cache: {found.num_blocks * found.block_size:,} tokens"
    )
    console.print(table)
