"""``aioengine fleet``: shows a running fleet, and drains its replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from aioengine.checks import nearest
from aioengine.cli.flags import Switch
from aioengine.cli.tables import print_table
from aioengine.errors import ConfigError
from aioengine.fleet.existing import answering, existing_fleet

AppName = Annotated[str, Parameter(name="--app-name", help="Name of the Serve application.")]


def status(*, app_name: AppName = "aioengine") -> int:
    """Print the replicas of a fleet, their load, and the adapters in their slots.

    Searches the cluster that RAY_ADDRESS names, or this machine's.
    """
    columns = ("replica", "state", "process", "node", ">running", ">waiting", ">KV free", "slots")
    rows = [
        [
            *(str(row[name]) for name in ("replica", "state", "pid", "node", "running", "waiting")),
            f"{row['kv_free']:.0%}",
            " ".join(name or "-" for name in row["slots"]),
        ]
        for row in _described(app_name)
    ]
    print_table(columns, rows, f"Fleet {app_name}")
    return 0


def drain(replica: str, *, undo: Switch = False, app_name: AppName = "aioengine") -> int:
    """Stop sending new requests to a replica; accepted ones finish.

    Args:
        replica: Its name, as aioengine fleet status prints it.
        undo: Let it take new requests again.
    """
    names = [row["replica"] for row in _described(app_name)]
    if replica not in names:
        there = ", ".join(names)
        raise ConfigError(f"there is no replica {replica!r}{nearest(replica, names)}; there are: {there}")
    with answering(app_name):
        handle = existing_fleet(app_name).options(method_name="drain")
        handle.remote(not undo, to=replica).result(timeout_s=10)
    print(f"replica {replica} {'takes requests again' if undo else 'drains'}")
    return 0


def _described(app_name: str) -> Sequence[dict[str, Any]]:
    with answering(app_name):
        handle = existing_fleet(app_name)
        rows: list[dict[str, Any]] = handle.broadcast("describe").results(timeout_s=10)
    return sorted(rows, key=lambda row: str(row["replica"]))
