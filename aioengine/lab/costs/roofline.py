"""Makes a cost model from published figures: a roofline for the base model, traffic and launches for
adapters.

Every result is an estimate. The method is the roofline of Williams, Waterman and Patterson (2009), as applied
to decoding by Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files

import msgspec

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.model import CostModel, Stage, sizes_of
from aioengine.lab.costs.steps import Curve, StepCosts, significant
from aioengine.lab.workload.lengths import MAX_RANK
from aioengine.memory_plan import spec_from_config, spec_of_a_rank
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.spec import DTYPE_BYTES, ModelSpec

_LINKS = {
    "between GPUs": "NVIDIA H100 data sheet: NVLink, 900 GB/s in both directions together; without NVLink as "
    "host_to_device; assumed: 80% of it, 10 us for each all-reduce"
}


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU and its host. Bandwidths are in bytes per second."""

    name: str
    memory: int
    """Bytes that an engine can use."""
    bandwidth: float
    """Peak bandwidth of the device's memory."""
    flops: float
    """Peak of dense matrix products in the model's dtype."""
    host_to_device: float
    """Achieved bandwidth."""
    disk: float
    """Achieved bandwidth, including checks and conversion of an adapter."""
    sources: dict[str, str]
    """Origin of each figure."""
    weights_achieved: float = 0.8
    """Share of the bandwidth that is reached when weights are read in decode."""
    kv_achieved: float = 0.6
    """Share of the bandwidth that is reached when keys and values are read."""
    linear_achieved: float = 0.6
    """Share of the flops that is reached in the linears of a prefill."""
    attention_achieved: float = 0.5
    """Share of the flops that is reached in the attention of a prefill."""
    lora_bandwidth_achieved: float = 0.5
    lora_flops_achieved: float = 0.1
    lora_launch: float = 3e-6
    """Minimum seconds of each shrink or expand kernel of a layer."""
    step: float = 3e-4
    """Seconds of every step that are in no other term."""
    sequence: float = 1e-5
    """Host seconds for each sequence of a step."""
    step_overhead: float = 1e-3
    """Seconds between steps."""
    link: float | None = None
    """Bandwidth between two of these GPUs, in each direction; None: they have only that to the host."""
    link_achieved: float = 0.8
    link_latency: float = 1e-5
    """Seconds of an all-reduce that do not depend on its size."""
    disk_latency: float = 5e-3
    slot_latency: float = 1e-4


def estimate(
    name: str,
    model: ModelSpec,
    device: DeviceFigures,
    gpus: int = 1,
    *,
    sources: Mapping[str, str] | None = None,
) -> CostModel:
    """Return the cost model of ``model``, in its dtype, on ``gpus`` of ``device``.

    Decode reads all weights but the input embedding once a step, in the form in which they are stored. A LoRA
    step launches a shrink and an expand for each of a layer's four fused linears, and reads A and B of every
    distinct adapter. Several GPUs share each layer as in Megatron (arXiv 1909.08053): each has a part of all
    that, and after the attention, after the MLP and after the embedding they sum their results, in a ring
    (Patarasuk and Yuan, 2009).

    ``sources`` are those of the model's sizes, and others than the device's own.

    Raises ConfigError if the model cannot be divided so.
    """
    spec = spec_of_a_rank(model, gpus)
    nbytes = DTYPE_BYTES[model.dtype]
    head = spec.vocab_size * spec.hidden_size
    layers = spec.num_parameters() - head * (1 if spec.tie_embeddings else 2)
    modules = _of_a_token(spec)
    rank_elements = sum(spec.layers_with(module) * sum(spec.linear(module)) for module in modules)
    reduces = (2 * spec.num_layers + 1) * (gpus > 1)
    summed = reduces * spec.hidden_size * nbytes * 2 * (gpus - 1) / gpus
    link = (device.link or device.host_to_device) * device.link_achieved
    weights, kv, lora = (
        device.bandwidth * achieved
        for achieved in (device.weights_achieved, device.kv_achieved, device.lora_bandwidth_achieved)
    )
    flops, attention, lora_flops = (
        device.flops * achieved
        for achieved in (device.linear_achieved, device.attention_achieved, device.lora_flops_achieved)
    )
    number = _read_bytes(spec, nbytes) / (layers + head) / weights
    linears = _linears(spec, number=number, flop=1 / flops, numbers=layers, head=head)
    steps = StepCosts(
        step=device.step + reduces * device.link_latency,
        linears=_with_each(summed / link, linears),
        sequence=device.sequence + 2 * head / flops,
        decode_kv=spec.kv_bytes_per_token(nbytes) / kv,
        prefill_pair=4 * spec.q_size * spec.num_layers / attention,
        lora_step=8 * spec.num_layers * device.lora_launch,
        adapter=_by_rank(0.0, rank_elements * nbytes / lora),
        lora_token=_by_rank(_lora_activations(spec, modules) * nbytes / lora, 2 * rank_elements / lora_flops),
    )
    slowdown = round(1 + device.host_to_device / device.bandwidth, 4)
    return CostModel(
        name=name,
        source=f"published figures of {f'{gpus} times ' * (gpus > 1)}{device.name}; see docs/lab-costs.md",
        estimate=True,
        sources={**device.sources, **(sources or {}), **(_LINKS if gpus > 1 else {})},
        model=sizes_of(model),
        steps=steps.rounded(),
        step_overhead=device.step_overhead,
        disk=Stage(device.disk_latency, device.disk),
        slot=Stage(device.slot_latency, device.host_to_device, slowdown),
        device="cuda",
        device_memory=device.memory,
        tensor_parallel_size=gpus,
    )


def estimate_of(model: str, device: str) -> CostModel:
    """Return the estimate of a model folder, or of a name that ``EngineConfig.model`` takes, on one of
    :data:`DEVICES`, or on several ("h100x4") that share every layer. Reads the model's description, not its
    weights.

    Raises ConfigError if there is no such model or device, if no cost model describes the model, or if it
    cannot be divided so.
    """
    found = re.fullmatch(r"(.+?)(?:x([1-9]\d?))?", device)
    kind, count = (found[1], int(found[2] or 1)) if found else (device, 1)
    if kind not in DEVICES:
        raise ConfigError(
            f"no published figures of {device!r}; there are those of {', '.join(DEVICES)}, and of several: "
            "h100x4"
        )
    spec, sources = spec_from_config(EngineConfig(model=model)), {"model": "its configuration"}
    return estimate(f"{model}@{device}", spec, DEVICES[kind], count, sources=sources)


def _of_a_token(spec: ModelSpec) -> tuple[str, ...]:
    """Return the modules of a layer that one token uses, with as many experts as a token has."""
    if not isinstance(spec, MixtureSpec):
        return spec.targets(None)
    chosen = {f"experts.{expert}" for expert in range(spec.experts_per_token)}
    parents = {module: module.rpartition(".")[0] for module in spec.targets(None)}
    return tuple(m for m, parent in parents.items() if not parent.startswith("experts.") or parent in chosen)


def _linears(spec: ModelSpec, *, number: float, flop: float, numbers: int, head: int) -> Curve:
    """Return the seconds of the linears by number of tokens, for ``numbers`` weights in the layers and
    ``head`` in the head. Reading a weight takes ``number`` seconds.

    Tokens that choose their experts evenly read ``experts * (1 - (1 - chosen / experts) ** tokens)`` of them.
    """
    if not isinstance(spec, MixtureSpec):
        return _roofline(least=(numbers + head) * number, token=2 * numbers * flop)
    expert = 3 * spec.hidden_size * spec.expert_size * spec.num_layers
    others = numbers - spec.experts * expert
    absent = 1 - spec.experts_per_token / spec.experts
    token = 2 * (others + spec.experts_per_token * expert) * flop
    ends = _roofline(least=(numbers + head) * number, token=token)
    counts = [2.0**i for i in range(10) if 2**i < ends[0][0] / 2]
    read = [(n, (others + head + spec.experts * (1 - absent**n) * expert) * number) for n in counts]
    return (*((n, max(seconds, n * token)) for n, seconds in read), *ends)


def _read_bytes(spec: ModelSpec, nbytes: int) -> int:
    """Return the bytes of all weights, as they are stored, that a step reads. It reads a tied embedding as
    the head; of any other only the rows of its tokens, which are next to nothing."""
    total = spec.weights_bytes(nbytes, "none")
    if spec.tie_embeddings:
        return total
    table = spec.linear("embed_tokens")
    packed = [packing for name, packing in spec.packed.items() if name.rpartition(".")[2] == "embed_tokens"]
    return total - sum(p.nbytes(*table) for p in packed) if packed else total - table[0] * table[1] * nbytes


def _with_each(seconds: float, curve: Curve) -> Curve:
    """Return the curve with additional seconds for each token."""
    if not seconds:
        return curve
    start = () if curve[0][0] <= 1 else ((1.0, curve[0][1]),)
    return tuple((n, value + n * seconds) for n, value in (*start, *curve))


def _roofline(*, least: float, token: float) -> Curve:
    """Return a curve that memory bounds for few tokens, and arithmetic for more."""
    knee = significant(least / token)
    return ((knee, least), (10 * knee, 10 * least))


def _by_rank(base: float, each: float) -> Curve:
    return ((0.0, base), (float(MAX_RANK), base + MAX_RANK * each))


def _lora_activations(spec: ModelSpec, modules: Iterable[str]) -> int:
    """Return the elements that the adapters' kernels move for one token: they read each fused linear's input,
    and read and write its output."""
    outputs = sum(spec.linear(module).out_features for module in modules)
    inner = spec.intermediate_size
    if isinstance(spec, MixtureSpec):
        inner = spec.experts_per_token * spec.expert_size
    inputs = 2 * spec.hidden_size + spec.q_size + inner  # qkv, gate and up; o; down
    return (inputs + 2 * outputs) * spec.num_layers


DEVICES: dict[str, DeviceFigures] = msgspec.json.decode(
    (files("aioengine.lab.costs") / "devices.json").read_bytes(), type=dict[str, DeviceFigures]
)
"""Devices with published figures, by name."""
