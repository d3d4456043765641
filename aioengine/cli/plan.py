"""``aioengine plan``: shows the memory that an engine would take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aioengine.cli.common import CommonFlags
from aioengine.cli.flags import EngineFlags
from aioengine.errors import ConfigError, PolicyError

if TYPE_CHECKING:
    from aioengine.memory_plan import MemoryPlan


def plan(
    *, ranks: str | None = None, engine: EngineFlags | None = None, common: CommonFlags | None = None
) -> int:
    """Print the memory that an engine with these settings needs, without reading weights.

    Exits with 2 and names the setting to change if it does not fit, or --batch-invariant is not possible.

    Parameters
    ----------
    ranks
        Shares of the adapters' ranks, "8:.7,16:.2,64:.1": compares ways to give memory to them.
    """
    from aioengine.cli.progress import load_progress
    from aioengine.memory_plan import plan_from_config
    from aioengine.model.coverage import planned_cpu_level, planned_variance
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
    shares = None if ranks is None else _shares(ranks, found)
    cpu_level = planned_cpu_level() if found.device == "cpu" else None
    _print(found, config.model, spec.ran_by, variance, cpu_level)
    if shares is not None:
        _compare(found, shares)
    return 0


def _shares(ranks: str, found: MemoryPlan) -> dict[int, float]:
    """Parse shares by rank. Raises ConfigError."""
    from aioengine.lab.workload.distributions import parse_ranks

    if not found.num_slots:
        raise ConfigError(f"--ranks {ranks}: there are no adapters, because --max-loras is 0; raise it")
    shares = parse_ranks("ranks", ranks).shares
    if max(shares) > found.max_rank:
        raise ConfigError(
            f"--ranks {ranks}: rank {max(shares)} is above the slots' {found.max_rank}; raise --max-lora-rank"
        )
    return shares


def _compare(found: MemoryPlan, shares: dict[int, float]) -> None:
    """Print how each form of ``slot_memory`` would use the memory of the plan, and recommend one."""
    from rich.table import Table

    from aioengine.checks import format_bytes
    from aioengine.cli.tables import box_for, output_console

    console = output_console()
    mean = sum(share * found.bytes_at(rank) for rank, share in shares.items())
    pool, tokens = found.slot_pool_bytes, found.num_blocks * found.block_size
    slots = pool // found.slot_bytes
    table = Table(
        title=f"{format_bytes(pool + found.kv_bytes)}, adapters of {format_bytes(round(mean))} on average",
        title_justify="left",
        box=box_for(console),
    )
    for heading in ("slot_memory", "adapters", "tokens of KV cache"):
        table.add_column(heading, justify="left" if heading == "slot_memory" else "right")
    table.add_row("None: slots of one size", f"{slots:,}", f"{tokens:,}")
    by_bytes, size = int(pool / mean), format_bytes(pool).replace(" ", "")
    table.add_row(f'"{size}"', f"{by_bytes:,}", f"{tokens:,}")
    console.print(table)
    advice = "slots of one size: no more of these adapters would fit by bytes"
    if by_bytes > slots:
        advice = f'slot_memory="{size}": more of these adapters fit by bytes'
    console.print(f"recommended: {advice}", highlight=False, soft_wrap=True)


def _print(found: MemoryPlan, model: str, ran_by: str, variance: str | None, cpu_level: str | None) -> None:
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
        # A module's share is part of the slot pool's row, so it is not among the rows that add up.
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
        line += f"with slot_memory={format_bytes(found.slot_pool_bytes)}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"model: {ran_by}", highlight=False, soft_wrap=True)
    invariance = "on" if variance is None else f"off: {variance}"
    console.print(f"batch invariance {invariance}", highlight=False, soft_wrap=True)
    if cpu_level is not None:
        console.print(f"CPU kernels: {cpu_level}", highlight=False, soft_wrap=True)
