"""Engine configuration: frozen msgspec structs, checked when they are built.

Every rejected value raises :class:`~aioengine.errors.ConfigError` that names the field, the value,
what is allowed, and what to do. Ranges and choices are in the fields' types; :data:`CONFLICTS` has the
settings that exclude each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import msgspec
from msgspec import Meta

from aioengine import checks
from aioengine.checks import Count, FilePath, Seconds, Size, Text, Whole
from aioengine.errors import ConfigError
from aioengine.model.spec import TARGETABLE_MODULES, ModelImpl, Quantization
from aioengine.schedulers import registry

DType = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
ExecutorName = Literal["thread", "process", "ray"]

OTHER_TABLES = ("server", "fleet", "adapters")
"""Tables of a configuration file that are not the engine's."""

ALLOWED_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 320, 512)

REMOVED = {
    "overlap": "it made nothing faster; leave it out, no token changes",
    "merge": "adapters are no longer merged with the base model's weights. Leave it out; an adapter that all "
    "requests use can be merged with PEFT's merge_and_unload, and served as the model",
    "slot_memory='shared'": "adapters and the KV cache no longer share one memory. Set slot_memory to a "
    "number of bytes, such as '256MiB', and lower kv_cache_memory by as much",
    "kv_cache_dir": "prefixes are kept in memory only. Leave it out",
    "kv_cache_dir_bytes": "prefixes are kept in memory only. Leave it out",
    "speculation='suffix'": "earlier outputs propose no tokens any more. Set speculation='ngram'",
    "allow_nonfinite": "adapters whose weights contain NaN or infinity are always refused. Leave it out, and "
    "train such an adapter again",
    "bind_threads": "threads of steps stay on no core of their own. Leave it out; on a machine with several "
    "NUMA nodes start an engine on each with numactl --cpunodebind=N --membind=N",
    "api_key_file": "set the variable AIOENGINE_API_KEYS, or use a file of hashed keys (--keys)",
    "admin_key_file": "set the variable AIOENGINE_ADMIN_KEYS, or use a file of hashed keys (--keys)",
    "max_waiting_per_adapter": "requests are bounded by tenant. Set max_waiting_per_tenant",
    "policy_max_overruns": "fcfs replaces a policy after 20 slow decisions. Raise policy_time_budget instead",
    "max_tenant_labels": "tenants have as many labels as adapters. Set max_adapter_labels",
    "served_model_names": "set served_model_name in [server]",
}
"""Fields, and values of fields, that earlier versions had: why they went, and what to do instead."""

Modules = Annotated[
    Sequence[Text],
    Meta(min_length=1, extra={"is": f"a list of names, for most models of {', '.join(TARGETABLE_MODULES)}"}),
]


def refuse_removed(values: Mapping[str, object], source: str = "") -> None:
    """Raise ConfigError if one of ``values``, by their fields' names, was removed. The error begins with
    ``source``."""
    for name, value in values.items():
        named = value.partition(":")[0] if isinstance(value, str) else value
        for removed in (name, f"{name}={named!r}"):
            if removed in REMOVED:
                raise ConfigError(f"{source}{removed} was removed: {REMOVED[removed]}")
        if name == "policy" and (gone := registry.removed(value)):
            raise ConfigError(f"{source}{gone}")


class _ConfigType(msgspec.StructMeta):
    """The class of structs that refuse removed fields by name."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        refuse_removed(fields)
        return super().__call__(*args, **fields)


class _Config(msgspec.Struct, metaclass=_ConfigType, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A configuration."""


class LoRAConfig(_Config, frozen=True):
    """How many adapters the device and the CPU hold, and how large each may be."""

    max_loras: Count = 4
    """Adapter slots on the device. That many distinct adapters can be in one batch."""
    max_lora_rank: int = 16
    """The largest rank of an adapter. Without ``slot_memory`` every slot is sized for it."""
    max_trained_tokens: Annotated[int, Meta(ge=0, le=8192)] = 0
    """Rows of trained tokens (PEFT's ``trainable_token_indices``) for which every slot has room."""
    slot_memory: Size | None = None
    """Bytes that all slots share: an adapter takes what its own ranks need. None: slots of one size."""
    max_cpu_loras: Count | None = None
    """Adapters in the CPU cache, those in slots included; None means ``max_loras``."""
    max_cpu_lora_bytes: Size | None = None
    """A second bound on the CPU cache, such as 2GiB; None: only ``max_cpu_loras``."""
    max_held_lora_bytes: Size = "1GiB"
    """Host memory for the files of adapters that were given in memory, or uploaded."""
    fully_sharded_loras: bool = False
    """With tensor parallelism, shard all of the LoRA work instead of half of it."""
    lora_dtype: Literal["auto", "bfloat16", "float16", "float32", "int8"] = "auto"
    """dtype of adapters in slots and cache; "auto" is the model's, "int8" about half of bfloat16."""
    target_modules: Modules | None = None
    """Modules that the slots have room for; None: all linears of a layer, but not embeddings and head."""
    max_concurrent_loads: Annotated[int, Meta(ge=1, le=64)] = 2
    """Maximum adapters read from disk at once."""
    load_retries: Annotated[int, Meta(ge=0, le=20)] = 2
    """Retries of a read that failed for a temporary reason; after about 0.1, 0.2, ... s."""
    load_timeout: Seconds | None = 60.0
    """Seconds that a load, and a resolver's look-up, may take with retries; None: no limit."""
    adapter_root: FilePath | None = None
    """Folder, or URL such as s3://bucket/adapters, of adapters that are not registered."""

    def __post_init__(self) -> None:
        set_ = msgspec.structs.force_setattr
        if type(self.max_lora_rank) is not int or self.max_lora_rank not in ALLOWED_RANKS:
            allowed = ", ".join(map(str, ALLOWED_RANKS))
            raise ConfigError(f"max_lora_rank={self.max_lora_rank!r}: allowed are {allowed}; choose one")
        checks.check_fields(self)
        if (root := self.adapter_root) is not None:
            set_(self, "adapter_root", checks.file_url_path(root, field="adapter_root") or root)
        if self.cpu_capacity < self.max_loras:
            raise ConfigError(
                f"max_cpu_loras={self.max_cpu_loras}: must be >= max_loras={self.max_loras}, because "
                "an adapter in a slot also stays in the CPU cache; raise max_cpu_loras or lower max_loras"
            )
        set_(self, "max_cpu_loras", self.cpu_capacity)
        if self.target_modules is not None:
            known = [module for module in TARGETABLE_MODULES if module in self.target_modules]
            set_(self, "target_modules", tuple(dict.fromkeys((*known, *self.target_modules))))

    @property
    def cpu_capacity(self) -> int:
        """``max_cpu_loras`` with its default filled in."""
        return self.max_loras if self.max_cpu_loras is None else self.max_cpu_loras


class EngineConfig(_Config, frozen=True):
    """Everything that an engine needs to know before it starts."""

    model: Text
    """A Hugging Face folder, a GGUF file, "smollm2-135m" (extra ``demo``), or a Hub id (extra ``hub``)."""
    dtype: DType = "auto"
    """Compute dtype; "auto" is the checkpoint's (bfloat16 where that is float16 on a CPU)."""
    chat_template: FilePath | None = None
    """Jinja chat template, instead of the model's own."""
    model_impl: ModelImpl = "auto"
    """Code that runs the model: "native", "transformers" (docs/models.md), or "auto", the first if it can."""
    quantization: Quantization = "none"
    """Form of the linears' weights, made from any checkpoint when it is loaded (docs/performance.md)."""
    batch_invariant: Annotated[Literal["auto"] | bool, Meta(extra={"is": "'auto', True or False"})] = "auto"
    """Whether tokens must not depend on the batch (docs/determinism.md); "auto": where that is possible."""
    speculation: Literal["none", "ngram"] = "none"
    """Propose tokens, from the request's own text ("ngram"), and check several of them in one step."""
    device: Device = "auto"
    """Device that runs the model."""
    max_model_len: Annotated[int, Meta(ge=2)] | None = None
    """Longest prompt plus output, in tokens; None means the model's own limit (at most 8192)."""
    max_num_seqs: Count = 64
    """Maximum number of requests that run at once."""
    max_num_batched_tokens: Count = 2048
    """Maximum number of tokens computed in one step; longer prompts are prefilled in chunks."""
    max_step_seconds: Seconds | None = None
    """Seconds that a step with decodes should take; prompts are cut accordingly. None: 0.2 on a CPU."""
    block_size: Annotated[int, Meta(ge=1, le=1024)] = 16
    """Tokens in a KV block."""
    kv_cache_memory: Size | None = None
    """Memory for the KV cache, such as 2GiB; None: room for ``max_num_seqs`` requests, if it is free."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Keep keys and values in half the memory: "int8" on a CPU, "fp8" on CUDA."""
    enable_prefix_caching: bool = True
    """Share the KV blocks of equal prefixes."""
    cuda_graphs: bool = True
    """Record decode steps as CUDA graphs at start, so that the GPU does not wait for the host."""
    tensor_parallel_size: Count = 1
    """Processes that share every layer of the model. More than 1 needs ``executor="process"`` or "ray"."""
    executor: ExecutorName = "thread"
    """Where the model runs: a "thread" of this process, "process" (others), or "ray" (extra ``fleet``)."""
    restart: Literal["never", "on-failure"] = "never"
    """What to do when a process of the model is lost: die, or start again and fail the running requests."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    """Requests without a seed draw theirs from this one."""
    max_waiting: Count | None = None
    """Bound on waiting requests; the tenant with the most is refused. None: no bound, here and below."""
    max_waiting_per_tenant: Count | None = None
    """Bound on waiting requests of each tenant."""
    max_waiting_tokens: Count | None = None
    """Bound on prompt tokens of waiting requests, in equal parts for tenants; one of each is accepted."""
    max_waiting_tokens_per_tenant: Count | None = None
    """Bound on the prompt tokens of each tenant's waiting requests."""
    lora: LoRAConfig | None = msgspec.field(default_factory=LoRAConfig)
    """None turns adapters off."""
    policy: Annotated[
        Text | dict[str, Any],
        Meta(
            extra={"is": "a name, 'package.module:Class' or a table (an instance: AsyncEngine(policy=...))"}
        ),
    ] = "fcfs"
    """Scheduling policy ("fcfs:max_wait=2"), parts ("edf+gdsf"), path ("package.module:Class"), or table."""
    policy_time_budget: Seconds = 0.02
    """Seconds of processor time of a decision; after 20 that took more, fcfs replaces the policy."""
    max_adapter_labels: Whole = 100
    """Maximum number of adapters, and of tenants, with a separate metric label; the rest are "other"."""
    metrics_compat: Literal["none", "vllm"] = "none"
    """Export the metrics that request routers read also under the names that vLLM gave them."""
    name: Text = "default"
    """Value of the metrics' label "engine"; engines that are scraped together need different ones."""

    def __post_init__(self) -> None:
        checks.check_fields(self)
        if self.lora is not None and not isinstance(self.lora, LoRAConfig):
            raise ConfigError(f"lora={self.lora!r}: must be a LoRAConfig, or None for no adapters")
        values = {name: getattr(self.lora, name, None) for name in LoRAConfig.__struct_fields__}
        values |= msgspec.structs.asdict(self)
        for settings, why, instead in CONFLICTS:
            if all(
                values[name] != _DEFAULTS[name] if value == CHANGED else values[name] == value
                for name, value in settings.items()
            ):
                first = next(iter(settings))
                raise ConfigError(f"{first}={values[first]!r}: {why}; set {instead}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be >= max_num_seqs="
                f"{self.max_num_seqs}, so that every running request can decode one token a step; raise the "
                "first or lower the second"
            )

    @property
    def model_name(self) -> str:
        """Default name of the base model: ``model``, or the last part of it if it is an absolute path,
        because clients should not see the server's folders."""
        return os.path.basename(os.path.normpath(self.model)) if os.path.isabs(self.model) else self.model

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Build the configuration from plain data, such as a parsed TOML file.

        Raises ConfigError, which begins with ``source``, for an unknown field or a wrong value.
        """
        refuse_removed(values, f"{source}: ")
        for key in values:
            if key in LoRAConfig.__struct_fields__ and key not in cls.__struct_fields__:
                raise ConfigError(f"{source}: {key!r} belongs to the table lora: put it below a line [lora]")
        lora = values.get("lora")
        if isinstance(lora, Mapping):
            refuse_removed(lora, f"{source}, table lora: ")
            values = {**values, "lora": checks.from_plain(LoRAConfig, lora, f"{source}, table lora")}
        return checks.from_plain(cls, values, source)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a TOML file whose keys are the fields of this struct, and a table ``[lora]``. The tables
        ``[server]``, ``[fleet]`` and ``[adapters]``, which ``aioengine serve`` reads, are left out."""
        values = {name: value for name, value in checks.read_toml(path).items() if name not in OTHER_TABLES}
        return cls.from_dict({**values, **overrides}, source=str(path))


WAITING_BOUNDS = tuple(name for name in EngineConfig.__struct_fields__ if name.startswith("max_waiting"))
"""Fields that bound waiting requests; they can be changed while the engine runs."""


class Conflict(NamedTuple):
    """Settings that exclude each other."""

    settings: dict[str, Any]
    """Their values, by field; :data:`CHANGED` is any but the field's default. Errors name the first."""
    why: str
    instead: str
    """What to set."""


CHANGED = "changed"
_DEFAULTS = {
    field.name: field.default for kind in (EngineConfig, LoRAConfig) for field in msgspec.structs.fields(kind)
}

_NATIVE = "model_impl='native' if the native decoder runs the model (docs/models.md)"
CONFLICTS = (
    Conflict(
        {"tensor_parallel_size": CHANGED, "model_impl": "transformers"},
        "model_impl='transformers' does not shard models",
        f"tensor_parallel_size=1, or {_NATIVE}",
    ),
    Conflict(
        {"batch_invariant": True, "model_impl": "transformers"},
        "model_impl='transformers' computes linears with torch, whose order of sums depends on the batch",
        f"batch_invariant='auto', or {_NATIVE}",
    ),
    Conflict(
        {"batch_invariant": True, "device": "cuda"},
        "on CUDA the linears are cuBLAS's, whose order of sums depends on the batch",
        "device='cpu', or batch_invariant='auto'",
    ),
    Conflict(
        {"speculation": CHANGED, "device": "cuda"},
        "on CUDA logits depend on the batch, so tokens would depend on the proposals",
        "device='cpu', or speculation='none'",
    ),
    Conflict(
        {"tensor_parallel_size": CHANGED, "executor": "thread"},
        "executor='thread' runs the model in one piece",
        "executor='process', or tensor_parallel_size=1",
    ),
    Conflict(
        {"restart": CHANGED, "executor": "thread"},
        "executor='thread' runs the model in this process, where nothing can be started again",
        "executor='process', or restart='never'",
    ),
    Conflict(
        {"lora_dtype": "int8", "fully_sharded_loras": True, "tensor_parallel_size": CHANGED},
        "with fully_sharded_loras the scale of a row of A is also that of B's column, which other ranks have",
        "fully_sharded_loras=False, or lora_dtype='auto'",
    ),
)
"""Each is refused when the configuration is built; docs/configuration.md lists them."""
