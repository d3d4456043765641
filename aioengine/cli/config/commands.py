"""``aioengine config``: check, show and describe the configuration of a server.

One TOML file has everything: the fields of EngineConfig at its top, those of LoRAConfig in ``[lora]``, and
the flags of ``aioengine serve`` in ``[server]``. Environment variables (``AIOENGINE_`` and a flag's name)
override the file, and flags override both.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import msgspec

from aioengine.cli.config.checked import ELSEWHERE, FleetFlags, ServerFlags, check_all, server_config
from aioengine.cli.flags import EngineFlags
from aioengine.cli.policies import check_named
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.memory_plan import plan_memory, spec_from_config
from aioengine.model.files.sources import is_source, parse_hub_id
from aioengine.model.text.chat_template import read_chat_template


def check(
    *,
    server: ServerFlags = ServerFlags(),
    engine: EngineFlags = EngineFlags(),
    fleet: FleetFlags = FleetFlags(),
) -> int:
    """Check a configuration and its paths as serve would, without starting anything.

    Whether the memory and the device of this machine suffice is not checked, nor a model on the Hub, which is
    fetched at the start.
    """
    checked = check_all(server, engine, fleet)
    config = checked.config
    root = None if config.lora is None else config.lora.adapter_root
    if root is not None and not is_source(root) and not Path(root).expanduser().is_dir():
        raise ConfigError(
            f"LoRAConfig.adapter_root={root!r}: there is no such folder; create it, or correct the path"
        )
    check_named(config.policy)
    if config.chat_template is not None:
        read_chat_template(Path(config.chat_template))
    if Path(config.model).expanduser().exists() or parse_hub_id(config.model) is None:
        device = "cuda" if config.device == "cuda" else "cpu"
        # This machine's memory and devices may not be those of the one that serves.
        plan_memory(spec_from_config(config), config, device=device, available_bytes=sys.maxsize)
    print("the configuration is good")
    return 0


def show(
    *,
    server: ServerFlags = ServerFlags(),
    engine: EngineFlags = EngineFlags(),
    fleet: FleetFlags = FleetFlags(),
) -> int:
    """Print the effective configuration as TOML: the file, the environment and the flags together.

    Fields with their default are comments; API keys are left out.
    """
    config, adapters = server_config(engine), engine.adapters()
    replicas = fleet.fleet_config(config, adapters, engine)
    parts: dict[str, tuple[object, Mapping[str, Any], Set[str]]] = {
        "lora": (config.lora, msgspec.structs.asdict(LoRAConfig()), set()),
        "fleet": (replicas, _defaults(FleetConfig), ELSEWHERE.keys()),
        "server": (server, vars(ServerFlags()), {"api_key", "admin_key"}),
    }
    _print_fields(config, _defaults(EngineConfig), {"lora"})
    for title, (settings, defaults, left_out) in parts.items():
        if settings is not None:
            print(f"\n[{title}]")
            _print_fields(settings, defaults, left_out)
    if adapters:
        print("\n[adapters]")
        for name, path in adapters.items():
            print(f"{_text(name)} = {_text(path)}")
    return 0


def schema() -> int:
    """Print the JSON Schema of the configuration file, for editors."""
    print(msgspec.json.format(msgspec.json.encode(file_schema()), indent=2).decode())
    return 0


def file_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration file."""
    _, parts = msgspec.json.schema_components(
        (EngineConfig, ServerFlags, FleetConfig),
        schema_hook=lambda path: {"type": "string"},
        ref_template="#/$defs/{name}",
    )
    fields, fleet = parts.pop("EngineConfig"), parts["FleetConfig"]
    fields["properties"] |= {
        "server": {"$ref": "#/$defs/ServerFlags"},
        "fleet": {"$ref": "#/$defs/FleetConfig"},
        "adapters": {"type": "object", "additionalProperties": {"type": "string"}},
    }
    fields["required"] = fleet["required"] = []
    parts["ServerFlags"]["additionalProperties"] = False
    for name in ELSEWHERE:
        del fleet["properties"][name]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **fields, "$defs": parts}


def _defaults(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def _print_fields(settings: object, defaults: Mapping[str, Any], left_out: Set[str]) -> None:
    for name, default in defaults.items():
        value = getattr(settings, name)
        if value is not None and name not in left_out:
            print(f"{'# ' if value == default else ''}{name} = {_text(value)}")


def _text(value: Any) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
