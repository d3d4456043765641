"""``aioengine policies``: lists scheduler policies and parts, and checks whether one keeps its contract."""

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from aioengine.cli.flags import Count
from aioengine.cli.process import EXIT_NOT_VALID
from aioengine.cli.progress import progress
from aioengine.cli.tables import output_console
from aioengine.errors import PolicyError
from aioengine.schedulers import load_policy
from aioengine.schedulers.registry import PARTS, PolicyInfo, available

if TYPE_CHECKING:
    from aioengine.lab.policy_check.check import Finding


def check_named(policy: str | dict[str, Any]) -> None:
    """Raise PolicyError if a configuration names a policy that does not exist."""
    try:
        load_policy(policy)
    except ValueError as error:
        raise PolicyError(str(error)) from error


def policies() -> int:
    """List the scheduler policies, and the parts to compose one from."""
    console = output_console()
    sections = {
        "whole policies": "policy",
        **{f"parts, {kind}: {decides}": kind for kind, decides in PARTS.items()},
        "routers, of a fleet": "router",
        "placement of adapters, of a fleet": "placement",
        "number of replicas, of a fleet": "autoscaler",
    }
    for title, kind in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for info in available(kind).values():
            name, about = Text(f"  {info.name}", style="bold"), Text(info.summary)
            table.add_row(name, about.append(_details_of(info), style="dim"))
        console.print(Text(title, style="bold underline"))
        console.print(table, "")
    print("Name one alone (fcfs), with options (fcfs:max_wait=2), by parts (edf+gdsf+lookahead), or by path")
    print("(package.module:Class).")
    return 0


def _details_of(info: PolicyInfo) -> str:
    """Return what there is to know of a policy beside its summary, each on a line of its own."""
    lab_only = "future:" in info.options
    details = {
        "lab only": "it must know all arrivals beforehand, as in a trace" if lab_only else None,
        "options": None if lab_only else info.options,
        "longest wait": info.starvation_bound,
        "worst case": info.worst_case,
        "from": info.source,
    }
    return "".join(f"\n{name}: {text}" for name, text in details.items() if text)


def check(policy: str, /, *, runs: Count = 5) -> int:
    """Run a policy through random scenarios in virtual time, and report what it breaks.

    Scenarios have requests, tenants, deadlines, failed reads, adapters that come and go, and a lost device.
    After each event the engine's invariants are checked; at the end all requests must have been served. Exits
    with 3 if the policy raises, returns something other than a Decision, lets requests wait for ever, or
    decides differently when the same events happen again.

    Args:
        policy: A name (fcfs:max_wait=2), parts (edf+gdsf), package.module:Class, or my_policy.py:MyPolicy.
        runs: Runs of each scenario, with other events each time.
    """
    from aioengine.lab.policy_check.check import check_policy_contract
    from aioengine.lab.runs.simulate import check_policy

    check_policy(policy)
    with progress("checking") as show:
        found = check_policy_contract(
            lambda: check_policy(policy),
            runs=runs,
            progress=lambda done, total: show(done, total, f"{done:,} of {total:,} runs"),
        )
    console = output_console()
    slowest = found.slowest * 1e3
    counts = f"{found.runs} runs, {found.decisions:,} decisions, the slowest {slowest:.2g} ms"
    console.print(Text(f"{policy}: {counts}"))
    for finding in found.broken:
        console.print(Text(f"broken: {_once(finding)}", style="bold red"))
        console.print(Text(indent(finding.details.strip(), "  "), style="dim"))
    if not found.sound:
        return EXIT_NOT_VALID
    console.print("nothing is broken", style="green")
    return 0


def _once(finding: Finding) -> str:
    times = "once" if finding.times == 1 else f"{finding.times:,} times, first"
    return f"{finding.what} ({times}: {finding.first})"
