"""``aioengine fleet``: shows a running fleet, and drains its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from aioengine.info import AdapterInfo

AppName = Annotated[str, Parameter(name="--app-name", help="Name of the Serve application (aioengine).")]


def status(*, app_name: AppName = "aioengine", common: CommonFlags | None = None) -> int:
    """Print the replicas of a fleet, their load, and the adapters in their slots.

    Searches the cluster that RAY_ADDRESS names, or each cluster on this machine.
    """
    from aioengine.cli.tables import new_table, output_console

    console = output_console()
    columns = ("replica", "state", "process", "node", ">running", ">waiting", ">KV free", "slots")
    table = new_table(console, *columns, title=f"Fleet {app_name}")
    for row in _described(app_name):
        table.add_row(
            row["replica"],
            row["state"],
            str(row["pid"]),
            row["node"],
            str(row["running"]),
            str(row["waiting"]),
            f"{row['kv_free']:.0%}",
            " ".join(name or "-" for name in row["slots"]),
        )
    console.print(table)
    return 0


def adapters(*, app_name: AppName = "aioengine", common: CommonFlags | None = None) -> int:
    """Print the adapters of a fleet, and which replica has each in a slot or in its CPU cache."""
    from aioengine.cli.tables import new_table, output_console

    rows = _described(app_name)
    found: dict[str, dict[str, AdapterInfo]] = {}
    for row in rows:
        for info in row["adapters"]:
            found.setdefault(info.name, {})[row["replica"]] = info
    console = output_console()
    columns = ("adapter", "rank", "path", "pinned", *(row["replica"] for row in rows))
    table = new_table(console, *columns, title=f"Adapters of {app_name}")
    for name, where in sorted(found.items()):
        best = max(where.values(), key=lambda info: info.rank)
        pinned = "yes" if any(info.pinned for info in where.values()) else ""
        places = [_place(where.get(row["replica"])) for row in rows]
        table.add_row(name, str(best.rank or ""), best.path, pinned, *places)
    console.print(table)
    return 0


def drain(
    replica: str,
    *,
    undo: Annotated[bool, Parameter(negative="")] = False,
    app_name: AppName = "aioengine",
    common: CommonFlags | None = None,
) -> int:
    """Stop sending new requests to a replica; accepted ones finish.

    Args:
        replica: Its name, as aioengine fleet status prints it.
        undo: Let it take new requests again.
    """
    from aioengine.checks import nearest

    names = [row["replica"] for row in _described(app_name)]
    if replica not in names:
        there = ", ".join(names)
        raise ConfigError(f"there is no replica {replica!r}{nearest(replica, names)}; there are: {there}")
    _call(app_name, "drain", not undo, to=replica)
    print(f"replica {replica} {'takes requests again' if undo else 'drains'}")
    return 0


def _place(info: AdapterInfo | None) -> str:
    return "" if info is None or info.location == "disk" else info.location


def _described(app_name: str) -> Sequence[dict[str, Any]]:
    from aioengine.fleet.existing import answering, existing_fleet

    with answering(app_name):
        handle = existing_fleet(app_name)
        rows: list[dict[str, Any]] = handle.broadcast("describe").results(timeout_s=10)
    return sorted(rows, key=lambda row: str(row["replica"]))


def _call(app_name: str, method: str, *arguments: Any, to: str) -> None:
    from aioengine.fleet.existing import answering, existing_fleet

    with answering(app_name):
        existing_fleet(app_name).options(method_name=method).remote(*arguments, to=to).result(timeout_s=10)
