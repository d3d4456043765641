"""Makes a cost model from published figures: a roofline for the base model, traffic and launches for
adapters.

Every result is an estimate. The method is the roofline of Williams, Waterman and Patterson (2009), as applied
to decoding by Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102).
"""

from __future__ import annotations

import re

import msgspec

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.model import CostModel, ExpertShape, ModelShape, Stage
from aioengine.lab.costs.steps import Curve, StepCosts, significant
from aioengine.lab.workload.distributions import MAX_RANK
from aioengine.memory_plan import spec_from_config, spec_of_a_rank
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.spec import DTYPE_BYTES, ModelSpec


class DeviceFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU and its host. Bandwidths are in bytes per second."""

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
    name: str, device_name: str, model: ModelShape, device: DeviceFigures, gpus: int = 1
) -> CostModel:
    """Return the cost model of ``model`` on ``gpus`` of ``device``.

    Decode reads all weights but the input embedding once a step, in the form in which they are stored. A LoRA
    step launches a shrink and an expand for each of a layer's four fused linears, and reads A and B of every
    distinct adapter. Several GPUs share each layer as in Megatron (arXiv 1909.08053): each has a part of all
    that, and after the attention, after the MLP and after the embedding they sum their results, in a ring
    (Patarasuk and Yuan, 2009).

    Raises ConfigError if the model cannot be divided so.
    """
    spec = spec_of_a_rank(model.spec(), gpus)
    nbytes = DTYPE_BYTES[model.dtype]
    head = spec.vocab_size * spec.hidden_size
    layers = spec.num_parameters() - head * (1 if spec.tie_embeddings else 2)
    read_lora = device.bandwidth * device.lora_bandwidth_achieved
    reduces = (2 * spec.num_layers + 1) * (gpus > 1)
    each_token = reduces * spec.hidden_size * nbytes * 2 * (gpus - 1) / gpus
    link = (device.link or device.host_to_device) * device.link_achieved
    rank_elements = sum(spec.layers_with(module) * sum(spec.linear(module)) for module in _of_a_token(spec))
    linear_flops = device.flops * device.linear_achieved
    steps = StepCosts(
        step=device.step + reduces * device.link_latency,
        linears=_with_each(
            each_token / link,
            _linears(
                spec,
                number=_read_bytes(spec, nbytes)
                / (layers + head)
                / (device.bandwidth * device.weights_achieved),
                flop=1 / linear_flops,
                numbers=layers,
                head=head,
            ),
        ),
        sequence=device.sequence + 2 * head / linear_flops,
        decode_kv=spec.kv_bytes_per_token(nbytes) / (device.bandwidth * device.kv_achieved),
        prefill_pair=4 * spec.q_size * spec.num_layers / (device.flops * device.attention_achieved),
        lora_step=8 * spec.num_layers * device.lora_launch,
        adapter=_by_rank(0.0, rank_elements * nbytes / read_lora),
        lora_token=_by_rank(
            _lora_activations(spec) * nbytes / read_lora,
            2 * rank_elements / (device.flops * device.lora_flops_achieved),
        ),
    )
    return CostModel(
        name=name,
        source=f"published figures of {device_name}; see docs/lab-costs.md",
        estimate=True,
        sources=device.sources if gpus == 1 else {**device.sources, "between GPUs": _LINKS},
        model=model,
        steps=steps.rounded(),
        step_overhead=device.step_overhead,
        disk=Stage(device.disk_latency, device.disk),
        slot=Stage(
            device.slot_latency,
            device.host_to_device,
            slowdown=round(1 + device.host_to_device / device.bandwidth, 4),
        ),
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
    spec = spec_from_config(EngineConfig(model=model))
    what, figures = DEVICES[kind]
    if count > 1:
        what = f"{count} times {what}"
    return estimate(
        f"{model}@{device}",
        what,
        ModelShape.of(spec, spec.dtype),
        _of_model(figures, "its configuration"),
        count,
    )


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
    expert = 3 * spec.hidden_size * spec.expert_size * (spec.num_layers - len(spec.dense_layers))
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


def _lora_activations(spec: ModelSpec) -> int:
    """Return the elements that the adapters' kernels move for one token: they read each fused linear's input,
    and read and write its output."""
    outputs = sum(spec.linear(module).out_features for module in _of_a_token(spec))
    inner = spec.intermediate_size
    if isinstance(spec, MixtureSpec):
        inner = spec.experts_per_token * spec.expert_size
    inputs = 2 * spec.hidden_size + spec.q_size + inner  # qkv, gate and up; o; down
    return (inputs + 2 * outputs) * spec.num_layers


LLAMA3_8B = ModelShape(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_position=131072,
)
"""Llama 3.1 8B (arXiv 2407.21783, table 3): 8.03e9 parameters, 16.06 GB in bfloat16."""

OLMOE_1B_7B = ModelShape(
    family="olmoe",
    vocab_size=50304,
    hidden_size=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    intermediate_size=1024,
    max_position=4096,
    experts=ExpertShape(count=64, per_token=8, size=1024),
)
"""OLMoE 1B-7B (arXiv 2409.02060, table 1): 6.9e9 parameters, of which a token goes through 1.3e9."""

GEMMA3_4B = ModelShape(
    family="gemma3_text",
    vocab_size=262208,
    hidden_size=2560,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    intermediate_size=10240,
    max_position=131072,
    tie_embeddings=True,
    qk_norm=True,
)
"""Gemma 3 4B without its vision tower (arXiv 2503.19786, table 1): 3.9e9 parameters."""

_ASSUMED = {
    "achieved shares": "assumed: 80% of the bandwidth for weights (vLLM with this model on an A100 comes to "
    "77%, overheads included: johnmusgrave.com/p/vllm-throughput-latency-sweep-on), 60% for keys and values; "
    "60% of the peak for linears; attention at 50% lies between FlashAttention-2 (35% on an H100) and "
    "FlashAttention-3 (75%), arXiv 2407.08608",
    "LoRA": "assumed: 3 us a kernel, half of the bandwidth for A, B and activations, a tenth of the peak; "
    "8 adapters of rank 16 then cost 1 to 4 ms a decode step, and Punica (arXiv 2310.18547) reports 2 ms",
    "step, sequence, step_overhead, latencies": "assumed",
}

_LINKS = (
    "NVIDIA H100 data sheet: NVLink, 900 GB/s in both directions together; without NVLink as host_to_device; "
    "assumed: 80% of it, 10 us for each all-reduce"
)

H100_SXM = DeviceFigures(
    memory=78 * 2**30,
    link=450e9,
    bandwidth=3.35e12,
    flops=989e12,
    host_to_device=50e9,
    disk=3e9,
    sources={
        "model": "Llama 3.1 8B: arXiv 2407.21783, table 3; vocabulary: its config.json",
        "bandwidth, flops": "NVIDIA H100 data sheet, SXM: 3.35 TB/s, 1979 TFLOPS bfloat16 with sparsity, "
        "half of it without",
        "memory": "80 GB; assumed: 78 GiB are left by the driver and the CUDA context",
        "host_to_device": "PCIe 5.0 x16, 64 GB/s a direction; assumed: the 78% that pinned memory reaches on "
        "PCIe 4.0 (24.8 of 32 GB/s on an A100, forums.developer.nvidia.com/t/352186)",
        "disk": "assumed: 3 GB/s, half of what a PCIe 4.0 NVMe drive reads, for checks and conversion",
        **_ASSUMED,
    },
)

A10G = DeviceFigures(
    memory=22 * 2**30,
    bandwidth=600e9,
    flops=70e12,
    host_to_device=24.8e9,
    disk=1e9,
    sources={
        "model": "Llama 3.1 8B: arXiv 2407.21783, table 3; vocabulary: its config.json",
        "bandwidth, flops": "NVIDIA A10G: 600 GB/s, 70 TFLOPS dense "
        "(baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference; the A10 has 125)",
        "memory": "24 GB; assumed: 22 GiB are left by ECC, the driver and the CUDA context",
        "host_to_device": "PCIe 4.0 x16: 24.8 GB/s from pinned memory, measured on an A100 "
        "(forums.developer.nvidia.com/t/352186)",
        "disk": "assumed: 1 GB/s",
        **_ASSUMED,
    },
)


DEVICES = {"h100": ("one H100 SXM 80 GB", H100_SXM), "a10g": ("one A10G 24 GB", A10G)}
"""Devices with published figures: what each is, and the figures."""


def _of_model(device: DeviceFigures, source: str) -> DeviceFigures:
    """Return a device's figures together with the source of another model's sizes."""
    return msgspec.structs.replace(device, sources={**device.sources, "model": source})


def estimates() -> list[CostModel]:
    """Compute the cost models that aioengine ships as presets."""
    return [
        estimate("llama3-8b-h100", "one H100 SXM 80 GB", LLAMA3_8B, H100_SXM),
        estimate("llama3-8b-a10g", "one A10G 24 GB", LLAMA3_8B, A10G),
        estimate(
            "olmoe-1b-7b-h100",
            "one H100 SXM 80 GB",
            OLMOE_1B_7B,
            _of_model(
                H100_SXM,
                "OLMoE 1B-7B: arXiv 2409.02060, table 1; assumed: tokens choose experts evenly, and adapters "
                "are on all linears, experts included",
            ),
        ),
        estimate(
            "gemma3-4b-h100",
            "one H100 SXM 80 GB",
            GEMMA3_4B,
            _of_model(
                H100_SXM,
                "Gemma 3 4B: its config.json; as if all layers attended to everything, though five of six "
                "have a window of 1024 tokens, so long contexts are dearer here",
            ),
        ),
    ]
