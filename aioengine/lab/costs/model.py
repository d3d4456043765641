"""The cost model: how long a step, a load and a copy take. Plain data, read from and written to JSON.

No torch here. What the coefficients mean and where they come from is in docs/lab-costs.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from aioengine.checks import LARGEST, Count, check_fields, refuse_unknown
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.steps import NotNegative, StepCosts, StepShape, StepTimes
from aioengine.lab.workload.requests import AdapterShape
from aioengine.memory_plan import MemoryPlan, plan_memory, spec_of_a_rank
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.spec import DTYPE_BYTES, ModelSpec, Quantization

FORMAT = 2
"""The version of the JSON."""
_PAIR = re.compile(r"\[\s+([^\s,\[\]{}]+),\s+([^\s,\[\]{}]+)\s+\]")
"""A list of two numbers, which readable JSON has on one line."""


_DETAILS = (
    *("o_bias", "mlp_bias", "qk_norm_whole", "norms", "fused_qkv", "fused_gate_up", "sinks"),
    *("sliding_windows", "packed", "shared_size", "names", "biased"),
)


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage of an adapter's move, disk to CPU or CPU to slot. Simultaneous moves share its bandwidth."""

    latency: NotNegative
    """Seconds of a move that do not depend on its size."""
    bandwidth: Annotated[float, Meta(gt=0, le=LARGEST)]
    """Bytes a second."""
    slowdown: Annotated[float, Meta(ge=1, le=LARGEST)] = 1.0
    """Factor on the time of steps meanwhile."""

    def __post_init__(self) -> None:
        check_fields(self)

    def seconds(self, nbytes: float) -> float:
        """Return the duration of a move without simultaneous moves."""
        return self.latency + nbytes / self.bandwidth


class ExpertShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The experts of each layer, in the place of an MLP."""

    count: Count
    per_token: Count
    size: Count

    def __post_init__(self) -> None:
        check_fields(self)


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The sizes of the model that was timed."""

    family: str = "llama"
    vocab_size: Count
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    intermediate_size: Count
    max_position: Count
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    experts: ExpertShape | None = None
    details: dict[str, Any] = {}
    """Other fields of the engine's specification that sizes depend on, where they are not as in Llama."""

    def __post_init__(self) -> None:
        check_fields(self)
        if unknown := sorted(self.details.keys() - set(_DETAILS)):
            raise ConfigError(f"model.details: unknown field {unknown[0]!r}; known: {', '.join(_DETAILS)}")
        try:
            self.spec()
        except msgspec.ValidationError as error:
            raise ConfigError(f"model.details: {error}") from error

    @classmethod
    def of(cls, spec: ModelSpec, dtype: str) -> Self:
        """Return the shape of a model that runs in ``dtype``.

        Raises ConfigError for a model that transformers runs, unless its sizes are those of a Llama.
        """
        of_spec = msgspec.structs.fields(type(spec))
        values: dict[str, Any] = {
            field.name: getattr(spec, field.name) for field in of_spec if field.name in cls.__struct_fields__
        }
        details = {
            field.name: getattr(spec, field.name)
            for field in of_spec
            if field.name in _DETAILS and getattr(spec, field.name) not in (field.default, {})
        }
        values |= {"dtype": dtype, "details": msgspec.json.decode(msgspec.json.encode(details))}
        if isinstance(spec, MixtureSpec):
            experts = spec.experts, spec.experts_per_token, spec.expert_size
            values["experts"] = dict(zip(ExpertShape.__struct_fields__, experts, strict=True))
        found = msgspec.convert(values, cls)
        if found.spec().num_parameters() != spec.num_parameters():
            raise ConfigError(
                f"{spec.ran_by}: a cost model describes models that the native decoder runs (docs/models.md)"
            )
        return found

    def spec(self) -> ModelSpec:
        """Return the engine's model specification, without an end-of-sequence token."""
        values = msgspec.structs.asdict(self) | {"rms_norm_eps": 1e-5, "rope": {}}
        experts: ExpertShape | None = values.pop("experts")
        values |= values.pop("details")
        if experts is None:
            return msgspec.convert(values, ModelSpec)
        chosen = {"experts": experts.count, "experts_per_token": experts.per_token, "normalized": False}
        return msgspec.convert({**values, **chosen, "expert_size": experts.size}, MixtureSpec)


class FitQuality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Errors of the fitted steps, as shares of the timed ones."""

    steps: int
    """Number of timed steps."""
    median_error: float
    p90_error: float


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times of a simulated device's operations, and its memory.

    In steady state a step begins ``step_seconds + step_overhead`` after the previous one.
    """

    format: int = FORMAT
    name: str
    source: str
    """Origin of the numbers: the machine and the versions, or a publication."""
    estimate: bool
    """Whether it is from published figures, not from measurements."""
    sources: dict[str, str] = msgspec.field(default_factory=dict)
    """Origin of individual numbers, by name."""
    model: ModelShape
    steps: StepCosts
    step_overhead: NotNegative = 0.0
    """Seconds from the end of a step to the beginning of the next."""
    disk: Stage
    slot: Stage
    device: Literal["cpu", "cuda"]
    device_memory: Count
    """Bytes for weights, slots and KV blocks (on a CPU for the adapter cache too): of each GPU, or of all
    processes on a CPU."""
    quantization: Quantization = "none"
    """How the engine quantized the weights that were timed, as in ``EngineConfig``. Weights that a checkpoint
    has quantized are in ``model``."""
    tensor_parallel_size: Count = 1
    """GPUs, or processes on a CPU, that share every layer."""
    fit: FitQuality | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def step_seconds(self, shape: StepShape) -> float:
        """Return the device's time for a step, without :attr:`step_overhead`. For many steps, make a
        StepTimes."""
        return StepTimes(self.steps)(shape)

    def adapter_nbytes(self, rank: int) -> int:
        """Return the bytes of an adapter on the CPU, those of one process if there are several: A and B of
        all layers' linears, in the model's dtype."""
        local = self.local
        per_rank = sum(
            local.layers_with(module) * sum(local.linear(module)) for module in local.targets(None)
        )
        return rank * per_rank * DTYPE_BYTES[local.dtype]

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec()

    @property
    def local(self) -> ModelSpec:
        """The share of one GPU or process."""
        return spec_of_a_rank(self.spec, self.tensor_parallel_size)

    def engine_config(self, config: EngineConfig) -> EngineConfig:
        """Return ``config`` for an engine with weights that are quantized and divided as the timed ones."""
        size = self.tensor_parallel_size
        own: dict[str, Any] = {"quantization": self.quantization, "tensor_parallel_size": size}
        if size > 1:
            own["executor"] = "process"
        return msgspec.structs.replace(config, **own)

    def plan(self, config: EngineConfig) -> MemoryPlan:
        """Return the memory of an engine on this device. Raises ConfigError if it does not fit."""
        config = self.engine_config(config)
        return plan_memory(self.spec, config, device=self.device, available_bytes=self.device_memory)

    def to_json(self) -> bytes:
        text = msgspec.json.format(msgspec.json.encode(self).decode(), indent=2)
        return _PAIR.sub(r"[\1, \2]", text).encode() + b"\n"

    def write(self, path: Path) -> None:
        path.write_bytes(self.to_json())

    @classmethod
    def from_json(cls, data: bytes, *, source: str = "cost model") -> Self:
        """Decode a cost model. Raises ConfigError, naming ``source`` and the field, if it is not valid."""
        try:
            values = msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{source} is not a JSON object: {error}") from error
        if (found := values.get("format", FORMAT)) != FORMAT:  # first: a later format has unknown fields
            todo = "" if isinstance(found, int) and found < FORMAT else "upgrade aioengine, or "
            raise ConfigError(
                f"{source}: format {found!r}, but this aioengine reads cost models of format {FORMAT}; "
                f"{todo}calibrate again"
            )
        refuse_unknown(cls, values, source)
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{source}: {error.__cause__ or error}") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read cost model {path}: {error.strerror}") from error
        return cls.from_json(data, source=str(path))


class ModelledCosts:
    """The :class:`~aioengine.schedulers.policy.CostsView` of a cost model.

    Args:
        shapes: The adapters, by name.
        chunk: Tokens that one step computes at most.
    """

    def __init__(self, costs: CostModel, shapes: Mapping[str, AdapterShape], chunk: int) -> None:
        self._costs = costs
        self._shapes = shapes
        self._chunk = chunk
        self._times = StepTimes(costs.steps)

    def step(self, tokens: int, ranks: Sequence[int] = (), *, context: int = 0) -> float | None:
        each, more = divmod(tokens, len(ranks)) if ranks else (0, 0)
        adapters = tuple((rank, each + (place < more)) for place, rank in enumerate(ranks))
        shape = StepShape(tokens, tokens * context, 0, 0, tokens, adapters)
        return self._times(shape) + self._costs.step_overhead

    def prefill(self, tokens: int, rank: int = 0, *, cached: int = 0) -> float | None:
        seconds = 0.0
        for start in range(0, tokens, self._chunk):
            count = min(self._chunk, tokens - start)
            pairs = count * (2 * (cached + start) + count) // 2
            adapters = ((rank, count),) if rank else ()
            shape = StepShape(0, 0, count, pairs, 1, adapters)
            seconds += self._times(shape) + self._costs.step_overhead
        return seconds

    def load(self, adapter: str, stage: Literal["disk", "slot"]) -> float | None:
        shape = self._shapes.get(adapter.partition("@")[0])
        if shape is None:
            return None
        nbytes = self._costs.adapter_nbytes(shape.rank) if shape.nbytes is None else shape.nbytes
        return (self._costs.disk if stage == "disk" else self._costs.slot).seconds(nbytes)
