"""Engine flags, shared by the commands that need a configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from aioengine.checks import read_toml
from aioengine.cli.config.file import adapters_table
from aioengine.cli.help import FOLDED
from aioengine.config import (
    Device,
    DType,
    EngineConfig,
    ExecutorName,
    KVCacheDType,
    LoRAConfig,
    LoRADType,
    MetricsCompat,
    Restart,
    SpeculationName,
)
from aioengine.errors import ConfigError
from aioengine.model.files.hub import is_source
from aioengine.model.spec import ModelImpl, Quantization

OTHER_TABLES = ("server", "fleet", "adapters")
"""Tables of the configuration file that are not the engine's."""
DEFAULT_MODEL = "smollm2-135m"

_ENGINE = Group("Engine", sort_key=10)
_LORA = Group("Adapters", sort_key=11)
_MORE_ENGINE = Group(f"{FOLDED} engine flags", sort_key=30)
_MORE_LORA = Group(f"{FOLDED} adapter flags", sort_key=31)

_IN_LORA, _IN_MORE, _IN_MORE_LORA = (Parameter(group=g) for g in (_LORA, _MORE_ENGINE, _MORE_LORA))
_MODULES = Parameter(group=_LORA, metavar="NAME=PATH", consume_multiple=1, negative="")
_TARGETS = Parameter(group=_MORE_LORA, consume_multiple=1, negative="")


@Parameter(name="*", group=_ENGINE)
@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Flags of the engine. A value that is not given comes from ``--config``, or else is the default."""

    model: str | None = None
    """Model folder, GGUF file, Hub id, or smollm2-135m (the default)."""
    config: Path | None = None
    """TOML file with the fields of EngineConfig; flags override it."""
    device: Device | None = None
    """Device that runs the model."""
    max_num_seqs: int | None = None
    """Maximum running requests (64)."""
    kv_cache_memory: str | None = None
    """Bytes, or text such as 2GiB; by default room for max_num_seqs requests."""
    policy: str | None = None
    """Scheduler policy (serve: fair; else fcfs); aioengine policies lists them."""
    seed: int | None = None
    """Seed for requests that have none (0; of serve: a random one)."""

    lora_modules: Annotated[list[str] | None, _MODULES] = None
    """Adapter to register; repeatable. PATH may be a URL."""
    max_loras: Annotated[int | None, _IN_LORA] = None
    """Adapter slots on the device (4)."""
    max_lora_rank: Annotated[int | None, _IN_LORA] = None
    """Rank that every slot is sized for (16)."""
    max_cpu_loras: Annotated[int | None, _IN_LORA] = None
    """Adapters in the CPU cache (as many as slots)."""

    executor: Annotated[ExecutorName | None, _IN_MORE] = None
    """Run the model in this process, or in separate ones."""
    tensor_parallel_size: Annotated[int | None, _IN_MORE] = None
    """Processes that shard the model (1); needs --executor process or ray."""
    restart: Annotated[Restart | None, _IN_MORE] = None
    """on-failure: restart the model's processes when one is lost."""
    dtype: Annotated[DType | None, _IN_MORE] = None
    """Compute dtype."""
    model_impl: Annotated[ModelImpl | None, _IN_MORE] = None
    """Model code: native, transformers, or auto (native if it knows the model)."""
    quantization: Annotated[Quantization | None, _IN_MORE] = None
    """Weights of the linears in fewer bits: int8, int4 or fp8."""
    batch_invariant: Annotated[bool | None, _IN_MORE] = None
    """Refuse to start if a request's tokens would depend on its batch."""
    bind_threads: Annotated[bool | None, _IN_MORE] = None
    """Keep each thread of a step on a core where there are several NUMA nodes."""
    speculation: Annotated[SpeculationName | None, _IN_MORE] = None
    """Check several proposed tokens in one step, copied from a request's own text (ngram)."""
    chat_template: Annotated[str | None, _IN_MORE] = None
    """Jinja chat template, instead of the model's own."""
    max_model_len: Annotated[int | None, _IN_MORE] = None
    """Maximum prompt plus output, in tokens."""
    max_num_batched_tokens: Annotated[int | None, _IN_MORE] = None
    """Maximum tokens in one step (2048)."""
    max_step_seconds: Annotated[float | None, _IN_MORE] = None
    """Target seconds of a step (0.2 on a CPU); prompts are chunked accordingly."""
    kv_cache_dtype: Annotated[KVCacheDType | None, _IN_MORE] = None
    """Keys and values in half the memory: int8 on a CPU, fp8 on CUDA."""
    block_size: Annotated[int | None, _IN_MORE] = None
    """Tokens in a KV block (16)."""
    enable_prefix_caching: Annotated[bool | None, _IN_MORE] = None
    """Share the KV blocks of equal prefixes."""
    max_prefix_pins: Annotated[float | None, _IN_MORE] = None
    """Share of the KV blocks that pinned prefixes may have (0.25)."""
    max_prefix_pins_per_tenant: Annotated[float | None, _IN_MORE] = None
    """The same for each tenant."""
    cuda_graphs: Annotated[bool | None, _IN_MORE] = None
    """Record decode steps as CUDA graphs at start."""
    max_waiting: Annotated[int | None, _IN_MORE] = None
    """Maximum waiting requests."""
    max_waiting_per_tenant: Annotated[int | None, _IN_MORE] = None
    """Maximum waiting requests of each tenant."""
    max_waiting_per_adapter: Annotated[int | None, _IN_MORE] = None
    """Maximum waiting requests for each adapter."""
    max_waiting_tokens: Annotated[int | None, _IN_MORE] = None
    """Maximum prompt tokens of waiting requests."""
    max_waiting_tokens_per_tenant: Annotated[int | None, _IN_MORE] = None
    """The same for each tenant."""
    policy_time_budget: Annotated[float | None, _IN_MORE] = None
    """Maximum seconds of one decision of the policy."""
    policy_max_overruns: Annotated[int | None, _IN_MORE] = None
    """Number of decisions over the budget after which fcfs takes over."""
    metrics_compat: Annotated[MetricsCompat | None, _IN_MORE] = None
    """vllm: also export vLLM's metrics, which request routers read."""
    max_adapter_labels: Annotated[int | None, _IN_MORE] = None
    """Maximum adapters with a separate metric label."""
    max_tenant_labels: Annotated[int | None, _IN_MORE] = None
    """Maximum tenants with a separate metric label."""
    name: Annotated[str | None, Parameter(group=_MORE_ENGINE, name="--engine-name")] = None
    """Value of the metrics' label "engine"."""

    adapter_root: Annotated[str | None, _IN_MORE_LORA] = None
    """Folder whose subfolders are adapters, by name."""
    slot_memory: Annotated[str | None, _IN_MORE_LORA] = None
    """Bytes that all slots share, such as 256MiB, or shared (with the KV cache); an adapter takes only what
    its ranks need."""
    max_trained_tokens: Annotated[int | None, _IN_MORE_LORA] = None
    """Rows of trained tokens that each slot has room for."""
    lora_dtype: Annotated[LoRADType | None, _IN_MORE_LORA] = None
    """dtype of adapters in slots and cache; int8 halves them."""
    target_modules: Annotated[list[str] | None, _TARGETS] = None
    """Modules that adapters may target; by default the linears of a layer."""
    max_cpu_lora_bytes: Annotated[str | None, _IN_MORE_LORA] = None
    """A second bound on the CPU cache: bytes, or text such as 2GiB."""
    max_held_lora_bytes: Annotated[str | None, _IN_MORE_LORA] = None
    """Maximum bytes of all uploaded adapters, which are kept in memory."""
    max_concurrent_loads: Annotated[int | None, _IN_MORE_LORA] = None
    """Maximum adapters read from disk at once."""
    load_retries: Annotated[int | None, _IN_MORE_LORA] = None
    """Retries of a read that failed for a transient reason."""
    load_timeout: Annotated[float | None, _IN_MORE_LORA] = None
    """Maximum seconds of a load."""
    allow_nonfinite: Annotated[bool | None, _IN_MORE_LORA] = None
    """Accept weights that contain NaN or infinity."""
    fully_sharded_loras: Annotated[bool | None, _IN_MORE_LORA] = None
    """With tensor parallelism, shard all of the LoRA work."""

    def engine_config(self) -> EngineConfig:
        """Return the file's configuration, overridden by the given flags.

        Raises ConfigError for errors in the file or the flags.
        """
        values, source = self.settings()
        return EngineConfig.from_dict(values, source=source)

    def settings(self) -> tuple[dict[str, Any], str]:
        """Return what the file and the flags set, as ``EngineConfig.from_dict`` takes it, and where it comes
        from, for errors."""
        values, source = _read(self.config)
        values.update(_given(self, _ENGINE_FIELDS))
        values.setdefault("model", DEFAULT_MODEL)
        lora = _given(self, _LORA_FIELDS)
        if lora:
            table = values.get("lora", {})
            if not isinstance(table, dict):
                raise ConfigError(f"{source}: lora={table!r}: must be a table [lora]")
            values["lora"] = {**table, **lora}
        return values, source

    def adapters(self) -> dict[str, str]:
        """Return name -> path of the file's table ``[adapters]`` and of ``--lora-modules``, which overrides
        it. Raises ConfigError if an entry is not name=path."""
        return {**adapters_table(self.config), **self._modules()}

    def _modules(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for item in self.lora_modules or ():
            name, equals, path = item.partition("=")
            if not (name and equals and path):
                raise ConfigError(
                    f"--lora-modules {item!r}: must be name=path; put what follows these before them, or "
                    "after --"
                )
            if name in found:
                raise ConfigError(f"--lora-modules: the name {name!r} is given twice")
            found[name] = path
        return found


def check_folders(adapters: Mapping[str, str]) -> None:
    """Raise ConfigError for the first path of ``--lora-modules`` that does not exist, before anything slow
    begins. (An engine would find out only when a request needs the adapter.)"""
    for name, path in adapters.items():
        if not is_source(path) and not Path(path).expanduser().is_dir():
            raise ConfigError(f"--lora-modules {name}={path}: there is no such folder; correct the path")


_FLAGS = {field.name for field in fields(EngineFlags)}
_LORA_FIELDS = tuple(name for name in LoRAConfig.__struct_fields__ if name in _FLAGS)
_ENGINE_FIELDS = tuple(name for name in EngineConfig.__struct_fields__ if name in _FLAGS)


def in_flags(text: str) -> str:
    """Return an error's text with "--max-loras" in place of "LoRAConfig.max_loras"."""
    return re.sub(
        r"\b(?:EngineConfig|LoRAConfig)\.(\w+)",
        lambda found: f"--{found[1].replace('_', '-')}" if found[1] in _FLAGS else found[0],
        text,
    )


def _given(flags: EngineFlags, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(flags, name)) is not None}


def _read(path: Path | None) -> tuple[dict[str, Any], str]:
    """Return the file's content, and its name for errors.

    The file is merged with the flags before it becomes an EngineConfig: defaults that depend on
    other fields (max_cpu_loras on max_loras) must see both.
    """
    if path is None:
        return {}, "flags"
    values = read_toml(path)
    return {name: value for name, value in values.items() if name not in OTHER_TABLES}, f"{path} and flags"
