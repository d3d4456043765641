"""``aioengine config``: check, show and describe the configuration of a server.

One TOML file has everything: the fields of EngineConfig at its top, those of LoRAConfig in ``[lora]``, and
the flags of ``aioengine serve`` in ``[server]``. Environment variables (``AIOENGINE_`` and a flag's name)
override the file, and flags override both.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import msgspec

from aioengine.cli.common import CommonFlags
from aioengine.cli.config.checked import ServerFlags, check_all, server_config
from aioengine.cli.config.sources import Parsed, ParsedLine
from aioengine.cli.flags import EngineFlags
from aioengine.cli.fleet.flags import ELSEWHERE, FleetFlags
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError, PolicyError
from aioengine.fleet.config import FleetConfig
from aioengine.memory_plan import plan_memory, spec_from_config
from aioengine.model.files.hub import is_source, parse_hub_id
from aioengine.model.text.chat_template import read_chat_template
from aioengine.schedulers import load_policy

_SECRET = ("api_key", "admin_key")


def check(
    *,
    server: ServerFlags | None = None,
    engine: EngineFlags | None = None,
    fleet: FleetFlags | None = None,
    common: CommonFlags | None = None,
    line: ParsedLine = None,
) -> int:
    """Check a configuration and its paths as serve would, without starting anything.

    Whether the memory and the device of this machine suffice is not checked, nor a model on the Hub, which is
    fetched at the start.
    """
    from aioengine.server.openai.sampling import read_sampling_defaults

    checked = check_all(server, engine, fleet)
    config, flags = checked.config, checked.flags
    root = None if config.lora is None else config.lora.adapter_root
    if root is not None and not is_source(root) and not Path(root).expanduser().is_dir():
        raise ConfigError(
            f"LoRAConfig.adapter_root={root!r}: there is no such folder; create it, or correct the path"
        )
    try:
        load_policy(config.policy)
    except ValueError as error:
        raise PolicyError(str(error)) from error
    if config.chat_template is not None:
        read_chat_template(Path(config.chat_template))
    if flags.generation_config not in ("auto", "none"):
        read_sampling_defaults(Path(flags.generation_config))
    if Path(config.model).expanduser().exists() or parse_hub_id(config.model) is None:
        spec = spec_from_config(config)
        device = "cuda" if config.device == "cuda" else "cpu"
        # This machine's memory and devices may not be those of the one that serves.
        plan_memory(spec, config, device=device, available_bytes=sys.maxsize)
    _tell(line)
    print("the configuration is good")
    return 0


def show(
    *,
    server: ServerFlags | None = None,
    engine: EngineFlags | None = None,
    fleet: FleetFlags | None = None,
    common: CommonFlags | None = None,
    line: ParsedLine = None,
) -> int:
    """Print the effective configuration as TOML: the file, the environment and the flags together.

    Fields with their default are comments; API keys are left out.
    """
    _tell(line)
    flags, engine_flags = server or ServerFlags(), engine or EngineFlags()
    config, adapters = server_config(engine_flags), engine_flags.adapters()
    replicas = (fleet or FleetFlags()).fleet_config(config, adapters, engine_flags)
    _print_table(_fields(config, {"lora"}), _defaults(EngineConfig))
    if config.lora is not None:
        print("\n[lora]")
        _print_table(_fields(config.lora), _fields(LoRAConfig()))
    if adapters:
        print("\n[adapters]")
        _print_table({msgspec.json.encode(name).decode(): path for name, path in adapters.items()}, {})
    if replicas is not None:
        print("\n[fleet]")
        _print_table(_fields(replicas, ELSEWHERE), _defaults(FleetConfig))
    print("\n[server]")
    given = {name: value for name, value in vars(flags).items() if name not in _SECRET}
    _print_table(given, {field.name: field.default for field in dataclasses.fields(ServerFlags)})
    return 0


def _tell(line: Parsed | None) -> None:
    while line is not None and line.unknown:
        print(f"aioengine: {line.unknown.pop(0)}", file=sys.stderr)


def schema(*, common: CommonFlags | None = None) -> int:
    """Print the JSON Schema of the configuration file, for editors."""
    print(msgspec.json.format(msgspec.json.encode(file_schema()), indent=2).decode())
    return 0


def file_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration file."""
    _, parts = msgspec.json.schema_components(
        (EngineConfig, ServerFlags, FleetConfig), schema_hook=_path_schema, ref_template="#/$defs/{name}"
    )
    fields = parts.pop("EngineConfig")
    fields["properties"]["server"] = {"$ref": "#/$defs/ServerFlags"}
    fields["properties"]["fleet"] = {"$ref": "#/$defs/FleetConfig"}
    fields["properties"]["adapters"] = {"type": "object", "additionalProperties": {"type": "string"}}
    fields["required"] = []
    parts["ServerFlags"]["additionalProperties"] = False
    of_fleet = parts["FleetConfig"]
    of_fleet["required"] = []
    for name in ELSEWHERE:
        del of_fleet["properties"][name]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **fields, "$defs": parts}


def _path_schema(kind: type) -> dict[str, Any]:
    if kind is Path:
        return {"type": "string"}
    raise NotImplementedError(kind)


def _fields(struct: msgspec.Struct, left_out: Container[str] = ()) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__ if name not in left_out}


def _defaults(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def _print_table(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is None:
            continue
        text = msgspec.json.encode(value, enc_hook=str).decode()
        same = name in defaults and defaults[name] == value
        print(f"{'# ' if same else ''}{name} = {text}")
