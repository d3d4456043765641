"""Flags that several commands share: of the engine, of recording, and for finding out what went wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from aioengine.checks import read_toml
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set, given
from aioengine.config import OTHER_TABLES, EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.model.files.sources import is_source

DEFAULT_MODEL = "smollm2-135m"

Count = Annotated[int, Parameter(validator=Number(gte=1))]
Texts = Annotated[list[str], Parameter(consume_multiple=1)]
"""At least one text after the flag, which can also be repeated."""
Switch = Annotated[bool, Parameter(negative="")]
"""A flag without a form ``--no-...``."""
Given = Annotated[Path, Parameter(show_default=False)]
"""A path whose default help pages do not show."""


@flag_set("Finding out what went wrong", 90, shown=())
class CommonFlags(Flags):
    """Flags of every command, which ``main`` takes before the command gets the others."""

    debug: Switch = False
    """Show an error's traceback before its line."""
    log_level: Literal["debug", "info", "warning", "error"] | None = None
    """Log to standard error, from this level on."""

    def configure_logging(self) -> None:
        """Configure logging for the program; the library never does."""
        if self.log_level is not None:
            form = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
            logging.basicConfig(level=self.log_level.upper(), format=form)


@flag_set("Recording", 80, shown=())
class RecordFlags(Flags):
    """A command takes it in a parameter called ``recording``."""

    record: Path | None = None
    """Append a line per request to this file, a trace for the lab without any text."""


@flag_set(
    "Engine",
    10,
    FieldsOf(EngineConfig, left_out=("lora",)),
    FieldsOf(LoRAConfig, title="Adapters"),
    shown=(
        *("model", "config", "device", "max_num_seqs", "kv_cache_memory", "policy", "seed", "lora_modules"),
        *("max_loras", "max_lora_rank", "max_cpu_loras"),
    ),
)
class EngineFlags(Flags):
    """Flags of the engine. A value that is not given comes from ``--config``, or else is the default."""

    model: str | None = None
    """Model folder, GGUF file, Hub id, or smollm2-135m (the default)."""
    config: Path | None = None
    """TOML file with the fields of EngineConfig; flags override it."""
    policy: str | None = None
    """Scheduler policy (serve: fair; else fcfs); see aioengine policies."""
    seed: int | None = None
    """Seed for requests that have none (0; of serve: a random one)."""
    lora_modules: Annotated[Texts | None, Parameter(metavar="NAME=PATH")] = None
    """Adapter to register; repeatable. PATH may be a URL."""
    name: Annotated[str | None, Parameter(name="--engine-name")] = None
    """Value of the metrics' label "engine"."""
    target_modules: Texts | None = None
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
            values["lora"] = {**(self.table("lora") or {}), **lora}
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
    """Raise ConfigError for the first path of ``--lora-modules`` that is no adapter's folder, before anything
    slow begins. (An engine would find out only when a request needs the adapter.)"""
    for name, path in adapters.items():
        folder = Path(path).expanduser()
        if is_source(path) or (folder / "adapter_config.json").exists():
            continue
        what = "it has no adapter_config.json" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"--lora-modules {name}={path}: {what}; correct the path")


_ENGINE_FLAGS = {*EngineConfig.__struct_fields__, *LoRAConfig.__struct_fields__} - {"lora"}


def in_flags(text: str) -> str:
    """Return an error's text with "--max-loras" in place of "LoRAConfig.max_loras"."""
    return re.sub(
        r"\b(?:EngineConfig|LoRAConfig)\.(\w+)",
        lambda found: f"--{found[1].replace('_', '-')}" if found[1] in _ENGINE_FLAGS else found[0],
        text,
    )
