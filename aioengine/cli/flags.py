"""Engine flags, shared by the commands that need a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from aioengine.checks import read_toml
from aioengine.cli.help import FOLDED
from aioengine.cli.struct_flags import StructFlags, flags_of, given
from aioengine.config import OTHER_TABLES, EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.model.files.hub import is_source

DEFAULT_MODEL = "smollm2-135m"

_ENGINE = Group("Engine", sort_key=10)
_LORA = Group("Adapters", sort_key=11)
_MORE_ENGINE = Group(f"{FOLDED} engine flags", sort_key=30)
_MORE_LORA = Group(f"{FOLDED} adapter flags", sort_key=31)
_MODULES = Parameter(group=_LORA, metavar="NAME=PATH", consume_multiple=1, negative="")


@Parameter(name="*", group=_ENGINE)
@dataclass(frozen=True, kw_only=True)
@flags_of(LoRAConfig, group=_LORA, more=_MORE_LORA, shown=("max_loras", "max_lora_rank", "max_cpu_loras"))
@flags_of(
    EngineConfig,
    group=_ENGINE,
    more=_MORE_ENGINE,
    shown=("device", "max_num_seqs", "kv_cache_memory", "policy", "seed"),
    left_out=("lora",),
)
class EngineFlags(StructFlags):
    """Flags of the engine. A value that is not given comes from ``--config``, or else is the default."""

    model: str | None = None
    """Model folder, GGUF file, Hub id, or smollm2-135m (the default)."""
    config: Path | None = None
    """TOML file with the fields of EngineConfig; flags override it."""
    policy: str | None = None
    """Scheduler policy (serve: fair; else fcfs); aioengine policies lists them."""
    seed: int | None = None
    """Seed for requests that have none (0; of serve: a random one)."""
    lora_modules: Annotated[list[str] | None, _MODULES] = None
    """Adapter to register; repeatable. PATH may be a URL."""
    name: Annotated[str | None, Parameter(group=_MORE_ENGINE, name="--engine-name")] = None
    """Value of the metrics' label "engine"."""
    target_modules: Annotated[
        list[str] | None, Parameter(group=_MORE_LORA, consume_multiple=1, negative="")
    ] = None
    """Modules that adapters may target; by default the linears of a layer."""

    def engine_config(self) -> EngineConfig:
        """Return the file's configuration, overridden by the given flags. Raises ConfigError."""
        values, source = self.settings()
        return EngineConfig.from_dict(values, source=source)

    def settings(self) -> tuple[dict[str, Any], str]:
        """Return what the file and the flags set, as ``EngineConfig.from_dict`` takes it, and where it comes
        from, for errors. (They are merged first, because defaults may depend on other fields.)"""
        table, source = self.file(), "flags" if self.config is None else f"{self.config} and flags"
        values = {name: value for name, value in table.items() if name not in OTHER_TABLES}
        values = {"model": DEFAULT_MODEL, **values, **given(self, EngineConfig)}
        if lora := given(self, LoRAConfig):
            in_file = values.get("lora", {})
            if not isinstance(in_file, dict):
                raise ConfigError(f"{source}: lora={in_file!r}: must be a table [lora]")
            values["lora"] = {**in_file, **lora}
        return values, source

    def file(self) -> dict[str, Any]:
        """Return the content of ``--config``. Raises ConfigError."""
        return {} if self.config is None else read_toml(self.config)

    def table(self, name: str) -> dict[str, Any] | None:
        """Return a table of the file, unchecked; None without one. Raises ConfigError if it is no table."""
        table = self.file().get(name)
        if table is not None and not isinstance(table, dict):
            raise ConfigError(f"{self.config}: {name}={table!r}: must be a table [{name}]")
        return table

    def adapters(self) -> dict[str, str]:
        """Return name -> path of the file's table ``[adapters]`` and of ``--lora-modules``, which overrides
        it. Raises ConfigError if an entry is not name=path."""
        found = self.table("adapters") or {}
        if not all(isinstance(path, str) for path in found.values()):
            raise ConfigError(
                f'{self.config}: adapters={found!r}: must be a table [adapters] with lines name = "path"'
            )
        names = set()
        for item in self.lora_modules or ():
            name, _, path = item.partition("=")
            if not (name and path):
                raise ConfigError(
                    f"--lora-modules {item!r}: must be name=path; put what follows these before them, or "
                    "after --"
                )
            if name in names:
                raise ConfigError(f"--lora-modules: the name {name!r} is given twice")
            names.add(name)
            found[name] = path
        return found


def check_folders(adapters: Mapping[str, str]) -> None:
    """Raise ConfigError for the first path of ``--lora-modules`` that does not exist, before anything slow
    begins. (An engine would find out only when a request needs the adapter.)"""
    for name, path in adapters.items():
        if not is_source(path) and not Path(path).expanduser().is_dir():
            raise ConfigError(f"--lora-modules {name}={path}: there is no such folder; correct the path")


_FLAGS = {field.name for field in fields(EngineFlags)}


def in_flags(text: str) -> str:
    """Return an error's text with "--max-loras" in place of "LoRAConfig.max_loras"."""
    return re.sub(
        r"\b(?:EngineConfig|LoRAConfig)\.(\w+)",
        lambda found: f"--{found[1].replace('_', '-')}" if found[1] in _FLAGS else found[0],
        text,
    )
