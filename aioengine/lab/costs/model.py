"""The cost model: how long a step, a load and a copy take. Plain data, read from and written to JSON.

No torch here. What the coefficients mean and where they come from is in docs/lab-costs.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from aioengine.checks import (
    LARGEST,
    Count,
    check_fields,
    check_value,
    from_plain,
    read_json,
    refuse_unknown,
)
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.steps import NotNegative, StepCosts, StepShape, StepTimes
from aioengine.lab.workload.requests import AdapterShape
from aioengine.memory_plan import MemoryPlan, plan_memory, spec_of_a_rank
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.spec import DTYPE_BYTES, ModelSpec, Quantization

FORMAT = 3
"""The version of the JSON."""
_SIZES = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("intermediate_size", "max_position"),
)
_UNTIMED: dict[str, Any] = {"rms_norm_eps": 1e-5, "rope": {}}
"""Fields of a specification that nothing here depends on."""


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


def sizes_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of a specification that are not their defaults, as plain data, and its dtype.

    Raises ConfigError for a model that transformers runs, unless its sizes are those of a Llama.
    """
    kind = MixtureSpec if isinstance(spec, MixtureSpec) else ModelSpec
    values = {
        field.name: getattr(spec, field.name)
        for field in msgspec.structs.fields(kind)
        if field.name not in _UNTIMED and getattr(spec, field.name) not in (field.default, {})
    }
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode({**values, "dtype": spec.dtype}))
    if spec_of_sizes(found).num_parameters() != spec.num_parameters():
        raise ConfigError(
            f"{spec.ran_by}: a cost model describes models that the native decoder runs (docs/models.md)"
        )
    return found


def spec_of_sizes(sizes: Mapping[str, Any]) -> ModelSpec:
    """Return the specification that :func:`sizes_of` has described. Raises ConfigError if it is none."""
    kind = MixtureSpec if "experts" in sizes else ModelSpec
    refuse_unknown(kind, sizes, "model")
    for name in _SIZES:
        check_value(f"model.{name}", sizes.get(name), Count)
    try:
        return msgspec.convert({**_UNTIMED, **sizes}, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"model: {error}") from error


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
    model: dict[str, Any]
    """The model that was timed, as :func:`sizes_of` describes it."""
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
        spec_of_sizes(self.model)

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
        return spec_of_sizes(self.model)

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

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a cost model. Raises ConfigError, which names the file and the field, if it is not valid."""
        values = read_json(path)
        if (found := values.get("format", FORMAT)) != FORMAT:  # first: a later format has unknown fields
            todo = "" if isinstance(found, int) and found < FORMAT else "upgrade aioengine, or "
            raise ConfigError(
                f"{path}: format {found!r}, but this aioengine reads cost models of format {FORMAT}; "
                f"{todo}calibrate again"
            )
        return from_plain(cls, values, str(path))


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
