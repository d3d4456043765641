"""``aioengine policies``: which scheduler policies and parts there are."""

from __future__ import annotations

from aioengine.cli.common import CommonFlags


def policies(*, common: CommonFlags | None = None) -> int:
    """List the scheduler policies, and the parts to put one together from.

    A policy is named alone (fcfs), with options (fcfs:max_wait=2), out of parts (edf+gdsf+lookahead),
    or by path (package.module:Class).
    """
    from rich.table import Table
    from rich.text import Text

    from aioengine.cli.tables import output_console
    from aioengine.schedulers import available_parts, available_policies
    from aioengine.schedulers.registry import KINDS
    from aioengine.schedulers.routing import available_autoscalers, available_placements, available_routers

    console = output_console()
    whole = [info for info in available_policies().values() if info.kind == "policy"]
    titles = {
        "order": "who goes first",
        "replace": "which idle adapter gives up its slot",
        "prefetch": "what to bring from disk to the CPU",
        "preempt": "whom to take off the batch",
    }
    sections = {"whole policies": whole}
    for kind in KINDS:
        sections[f"parts, {kind}: {titles[kind]}"] = list(available_parts(kind).values())
    for title, infos in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for info in infos:
            details = [info.summary]
            if "future:" in info.options:
                details.append("lab only: it must know all arrivals beforehand, as where a trace is replayed")
            elif info.options:
                details.append(f"options: {info.options}")
            if info.starvation_bound:
                details.append(f"longest wait: {info.starvation_bound}")
            if info.source:
                details.append(f"from: {info.source}")
            text = Text(details[0])
            for detail in details[1:]:
                text.append(f"\n{detail}", style="dim")
            table.add_row(Text(f"  {info.name}", style="bold"), text)
        console.print(Text(title, style="bold underline"))
        console.print(table)
        console.print()
    for title, of_fleet in (
        ("routers, of a fleet", available_routers()),
        ("placement of adapters, of a fleet", available_placements()),
        ("number of replicas, of a fleet", available_autoscalers()),
    ):
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for found in of_fleet.values():
            text = Text(found.summary)
            if found.options:
                text.append(f"\noptions: {found.options}", style="dim")
            text.append(f"\nworst case: {found.worst_case}\nfrom: {found.source}", style="dim")
            table.add_row(Text(f"  {found.name}", style="bold"), text)
        console.print(Text(title, style="bold underline"))
        console.print(table)
        console.print()
    console.print(
        "Name one alone (fcfs), with options (fcfs:max_wait=2), out of parts (edf+gdsf+lookahead), "
        "or by path (package.module:Class).",
        highlight=False,
    )
    return 0
