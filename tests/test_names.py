"""Names that others depend on do not go unseen: metrics with their labels, flags, fields, routes.

``names.txt`` has those that are promised; a new name is promised from the next release on, before which
``python tests/test_names.py`` writes the file anew. docs/compatibility.md says what it takes to remove one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from aioengine.cli.config.checked import ServerFlags
from aioengine.cli.main import COMMANDS, GROUPS
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.metrics.families import definitions
from aioengine.server.routes import METRICS, ROUTES

SNAPSHOT = Path(__file__).with_name("names.txt")


def names() -> Iterator[str]:
    for definition in definitions.ALL.values():
        yield f"metric {definition.exposed} {definition.kind} {','.join(definition.labels)}".rstrip()
    yield from (f"command {command}" for command in COMMANDS if command not in GROUPS)
    yield from (f"field {name}" for name in EngineConfig.__struct_fields__)
    yield from (f"field lora.{name}" for name in LoRAConfig.__struct_fields__)
    yield from (f"field server.{field.name}" for field in dataclasses.fields(ServerFlags))
    yield "route /metrics"
    yield from (f"route {route.path}" for route in ROUTES if route.scopes != METRICS)


def lines() -> list[str]:
    return sorted(name.rstrip() for name in names())


def test_no_name_has_gone_unseen() -> None:
    gone = sorted(set(SNAPSHOT.read_text(encoding="utf-8").splitlines()) - set(lines()))
    assert not gone, f"gone or changed, which takes what docs/compatibility.md says: {gone}"


def test_every_kind_of_name_is_promised() -> None:
    promised = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    assert {line.split()[0] for line in promised} == {"command", "field", "metric", "route"}
    assert len(promised) > 150


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n", encoding="utf-8")
