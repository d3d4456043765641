"""``python -m benchmarks ROOM CASE [--options]``, and ``--list``."""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Sequence

from cyclopts import App, Parameter

import benchmarks
from aioengine.lab.runs.provenance import cpu_name
from benchmarks.runner import Case, run

ROOMS = ("engine", "kernels", "adapters", "server", "fleet", "policies", "papers", "gpu", "peers")


def cases(room: str) -> Iterator[Case]:
    """Yield the cases of a room: those that its modules list."""
    package = importlib.import_module(f"{benchmarks.__name__}.{room}")
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if not found.name.rpartition(".")[2].startswith("run_"):  # scripts that peers run
            yield from getattr(importlib.import_module(found.name), "CASES", ())


def application(room: str) -> App:
    """Return the commands of a room: its cases, whose options are their arguments."""
    flags = Parameter(negative_iterable="", consume_multiple=True)
    app = App(f"python -m benchmarks {room}", default_parameter=flags, version_flags=())
    for case in cases(room):
        app.command(case, name=case.__name__)
    return app


def main(argv: Sequence[str]) -> int:
    """Run a case. Returns 1 if something in it has failed."""
    if argv in (["--list"], []):
        for room in ROOMS:
            for case in cases(room):
                print(f"{room} {case.__name__:20} {(case.__doc__ or '').strip().partition(chr(10))[0]}")
        return 0
    if argv[0] not in ROOMS:
        print(f"no room {argv[0]!r} of benchmarks; there are {', '.join(ROOMS)}", file=sys.stderr)
        return 2
    command, bound, _ = application(argv[0]).parse_args(argv[1:])
    found = command(*bound.args, **bound.kwargs)
    if command not in cases(argv[0]):
        return 0  # help
    print(f"python -m benchmarks {' '.join(argv)}; {cpu_name()}\n", flush=True)
    return asyncio.run(run(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
