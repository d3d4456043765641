"""Engine flags, shared by the commands that need a configuration."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"

_ENGINE = Group("Engine", sort_key=10)
_LORA = Group("Adapters", sort_key=11)

DType = Literal["auto", "bfloat16", "float16", "float32"]
Modules = Annotated[list[str] | None, Parameter(group=_LORA, consume_multiple=True, negative="")]


@Parameter(name="*", group=_ENGINE)
@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """What is not given here comes from ``--config``, and what is not there has a default."""

    config: Path | None = None
    """TOML file with the fields of EngineConfig and a table [lora]; flags override it."""
    model: str | None = None
    """Model folder, GGUF file, or smollm2-135m (the default)."""
    dtype: DType | None = None
    """Compute dtype."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where the model runs."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens."""
    max_num_seqs: int | None = None
    """Requests that run at once."""
    max_num_batched_tokens: int | None = None
    """Tokens computed in one step."""
    block_size: int | None = None
    """Tokens in a KV block."""
    kv_cache_memory: str | None = None
    """Bytes, or text such as 2GiB."""
    enable_prefix_caching: bool | None = None
    """Share the KV blocks of equal prefixes."""
    seed: int | None = None
    """Requests without a seed draw theirs from this."""
    max_waiting: int | None = None
    """Bound on waiting requests."""
    policy: str | None = None
    """Scheduler policy: a name, or package.module:Class."""
    metrics_compat: Literal["none", "vllm"] | None = None
    """vllm: export the metrics that request routers read as well."""

    max_loras: Annotated[int | None, Parameter(group=_LORA)] = None
    """Adapter slots on the device."""
    max_lora_rank: Annotated[int | None, Parameter(group=_LORA)] = None
    """Rank that every slot is sized for."""
    max_cpu_loras: Annotated[int | None, Parameter(group=_LORA)] = None
    """Adapters in the CPU cache."""
    fully_sharded_loras: Annotated[bool | None, Parameter(group=_LORA)] = None
    """With tensor parallelism, shard all of the LoRA work."""
    lora_dtype: Annotated[DType | None, Parameter(group=_LORA)] = None
    """dtype of the slots."""
    lora_modules: Modules = None
    """Adapters to register: name=path, more than one if need be."""

    def engine_config(self) -> EngineConfig:
        """The file's fields with the given flags over them.

        Raises ConfigError for what the file or the flags get wrong.
        """
        values, source = _read(self.config)
        values.update(_given(self, _ENGINE_FIELDS))
        values.setdefault("model", DEFAULT_MODEL)
        lora = _given(self, _LORA_FIELDS)
        if lora:
            table = values.get("lora", {})
            if not isinstance(table, dict):
                raise ConfigError(f"{source}: lora={table!r}: must be a table [lora]")
            values["lora"] = {**table, **lora}
        return EngineConfig.from_dict(values, source=source)

    def adapters(self) -> dict[str, str]:
        """Name -> path of the ``--lora-modules``; ConfigError if one is not name=path."""
        found: dict[str, str] = {}
        for item in self.lora_modules or ():
            name, equals, path = item.partition("=")
            if not (name and equals and path):
                raise ConfigError(f"--lora-modules {item!r}: must be name=path")
            if name in found:
                raise ConfigError(f"--lora-modules: the name {name!r} is given twice")
            found[name] = path
        return found


_LORA_FIELDS = ("max_loras", "max_lora_rank", "max_cpu_loras", "fully_sharded_loras", "lora_dtype")
_ENGINE_FIELDS = (
    "model",
    "dtype",
    "device",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory",
    "enable_prefix_caching",
    "seed",
    "max_waiting",
    "policy",
    "metrics_compat",
)


def _given(flags: EngineFlags, fields: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in fields if (value := getattr(flags, name)) is not None}


def _read(path: Path | None) -> tuple[dict[str, Any], str]:
    """The file's content, and what to call it in an error.

    The file is merged with the flags before it becomes an EngineConfig: defaults that depend on
    other fields (max_cpu_loras on max_loras) must see both.
    """
    if path is None:
        return {}, "flags"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")), f"{path} and flags"
    except OSError as error:
        raise ConfigError(f"cannot read configuration file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not valid TOML: {error}") from error
