"""``aioengine policies``: which scheduler policies there are."""

from __future__ import annotations

import inspect


def policies() -> int:
    """List the scheduler policies, built-in and installed, with their starvation bounds."""
    from rich.console import Console
    from rich.table import Table

    from aioengine.schedulers import available_policies, load_policy

    table = Table(title="Scheduler policies")
    for heading in ("name", "what it does", "how long a request can wait", "where"):
        table.add_column(heading, overflow="fold")
    broken = False
    for name, target in sorted(available_policies().items()):
        try:
            policy = load_policy(name)
        except ValueError as error:
            broken = True
            table.add_row(name, f"cannot be loaded: {error}", "", target)
            continue
        text = (inspect.getdoc(type(policy)) or "").split("\n\n")[0].replace("\n", " ")
        table.add_row(name, text, policy.starvation_bound, target)
    Console().print(table)
    return 1 if broken else 0
