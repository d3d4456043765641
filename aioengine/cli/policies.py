"""``aioengine policies``: lists scheduler policies and parts, and checks whether one keeps its contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from aioengine.lab.policy_check.check import Checked, Finding
    from aioengine.schedulers.registry import PolicyInfo

EXIT_BROKEN = 3


def policies(*, common: CommonFlags | None = None) -> int:
    """List the scheduler policies, and the parts to compose one from.

    A policy is named alone (fcfs), with options (fcfs:max_wait=2), by parts (edf+gdsf+lookahead), or by path
    (package.module:Class)."""
    from rich.table import Table
    from rich.text import Text

    from aioengine.cli.tables import output_console
    from aioengine.schedulers import available_parts, available_policies
    from aioengine.schedulers.registry import PARTS
    from aioengine.schedulers.routing import available_autoscalers, available_placements, available_routers

    console = output_console()
    whole = [info for info in available_policies().values() if info.kind == "policy"]
    sections = {"whole policies": whole}
    for kind, decides in PARTS.items():
        sections[f"parts, {kind}: {decides}"] = list(available_parts(kind).values())
    sections["routers, of a fleet"] = list(available_routers().values())
    sections["placement of adapters, of a fleet"] = list(available_placements().values())
    sections["number of replicas, of a fleet"] = list(available_autoscalers().values())
    for title, infos in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for info in infos:
            name, (summary, *details) = info.name, _details_of(info)
            text = Text(summary).append("".join(f"\n{detail}" for detail in details), style="dim")
            table.add_row(Text(f"  {name}", style="bold"), text)
        console.print(Text(title, style="bold underline"))
        console.print(table, "")
    print(
        "Name one alone (fcfs), with options (fcfs:max_wait=2), by parts (edf+gdsf+lookahead), "
        "or by path (package.module:Class)."
    )
    return 0


def _details_of(info: PolicyInfo) -> list[str]:
    """Return a policy's summary, and what else there is to know of it."""
    details = [info.summary]
    if "future:" in info.options:
        details.append("lab only: it must know all arrivals beforehand, as in a trace")
    elif info.options:
        details.append(f"options: {info.options}")
    if info.starvation_bound:
        details.append(f"longest wait: {info.starvation_bound}")
    if info.worst_case:
        details.append(f"worst case: {info.worst_case}")
    if info.source:
        details.append(f"from: {info.source}")
    return details


def check(
    policy: str,
    /,
    *,
    runs: Annotated[int, Parameter(name="--runs")] = 5,
    common: CommonFlags | None = None,
) -> int:
    """Run a policy through random scenarios in virtual time, and report what it breaks.

    Scenarios have requests, tenants, deadlines, failed reads, adapters that come and go, and a lost device.
    After each event the engine's invariants are checked; at the end all requests must have been served. Exits
    with 3 if the policy raises, returns something other than a Decision, lets requests wait for ever, or
    decides differently when the same events happen again.

    Args:
        policy: A name (fcfs:max_wait=2), parts (edf+gdsf), package.module:Class, or my_policy.py:MyPolicy.
        runs: Runs of each scenario, with other events each time.
    """
    from aioengine.cli.progress import progress
    from aioengine.cli.tables import output_console
    from aioengine.lab.policy_check.check import check_policy_contract
    from aioengine.lab.runs.simulate import check_policy

    if runs < 1:
        raise ConfigError(f"--runs {runs}: must be at least 1")
    check_policy(policy)
    with progress("checking") as show:
        found = check_policy_contract(
            lambda: check_policy(policy),
            runs=runs,
            progress=lambda done, total: show(done, total, f"{done:,} of {total:,} runs"),
        )
    _print_checked(output_console(), policy, found)
    return 0 if found.sound else EXIT_BROKEN


def _print_checked(console: Console, policy: str, found: Checked) -> None:
    from rich.text import Text

    slowest = found.slowest * 1e3
    console.print(
        f"{policy}: {found.runs} runs, {found.decisions:,} decisions, the slowest {slowest:.2g} ms",
        highlight=False,
    )
    for finding in found.broken:
        console.print(Text(f"broken: {_once(finding)}", style="bold red"))
        console.print(Text("  " + finding.details.strip().replace("\n", "\n  "), style="dim"))
    if found.refused:
        console.print("refused by the core, item by item (to name more than fits is no fault):")
    for finding in sorted(found.refused, key=lambda finding: -finding.times):
        console.print(Text(f"  {_once(finding)}: {finding.details}"))
    if found.sound:
        console.print("nothing is broken", style="green")


def _once(finding: Finding) -> str:
    times = "once" if finding.times == 1 else f"{finding.times:,} times, first"
    return f"{finding.what} ({times}: {finding.first})"
