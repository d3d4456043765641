"""``aioengine policies``: which scheduler policies and parts there are."""

from __future__ import annotations


def policies() -> int:
    """List the scheduler policies and the parts that they can be put together from."""
    from rich.console import Console
    from rich.table import Table

    from aioengine.schedulers import available_parts, available_policies
    from aioengine.schedulers.registry import KINDS

    console = Console()
    whole = [info for info in available_policies().values() if info.kind == "policy"]
    listed = {"policies": whole} | {f"parts: {kind}": [*available_parts(kind).values()] for kind in KINDS}
    for title, infos in listed.items():
        bounded = title in ("policies", "parts: order")
        table = Table(title=title, title_justify="left", expand=True)
        table.add_column("name", no_wrap=True)
        for heading in ("what it does", "options", "source"):
            table.add_column(heading, overflow="fold", ratio=2)
        if bounded:
            table.add_column("how long a request can wait", overflow="fold", ratio=2)
        for info in infos:
            row = [info.name, info.summary, info.options.replace(", ", "\n"), info.source]
            table.add_row(*row, *([info.starvation_bound] if bounded else []))
        console.print(table)
    console.print(
        "A policy is named alone (fcfs), with options (fcfs:max_wait=2), out of parts "
        "(edf+gdsf+lookahead), or by path (package.module:Class).",
        highlight=False,
    )
    return 0
