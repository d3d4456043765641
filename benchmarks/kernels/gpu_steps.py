"""What a layer does beside its linears and adapters, and whole decode steps, on a GPU; for ``gpu.py``."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import torch
from rich.table import Table
from torch import Tensor

from aioengine.kernels import AttentionPlan, Backend, LayerCache, Norm, Rotation, Scores, Span, get_backend
from aioengine.model.decode_graphs import CudaGraphs, DecodeLimits, DecodeSteps, Record
from aioengine.model.decoder import Decoder
from aioengine.model.kv_cache import KVCache
from aioengine.model.slots.image import image_shape
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import LORA_MODULES, ModelSpec
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork
from benchmarks.kernels import predictions

BLOCK = 16
Timer = Callable[[Callable[[], object]], float]


class Attended(NamedTuple):
    """A step's queries, keys and values over a cache."""

    qkv: Tensor
    rotation: Rotation
    cache: LayerCache
    plan: AttentionPlan

    @property
    def nbytes(self) -> int:
        """What attention must read and write at least: queries, what is cached, outputs."""
        cached = sum(span.start + span.length for span in self.plan.spans) * self.cache.keys[0, 0].numel()
        queries = self.qkv[:, : -2 * self.cache.keys.shape[2]].numel()
        return 2 * self.qkv.element_size() * (queries + cached)


def attended(spans: list[tuple[int, int]], spec: ModelSpec, dtype: torch.dtype, device: str) -> Attended:
    """Sequences as (positions in the cache, tokens)."""
    rows, found, tables, used = 0, [], [], 0
    for start, length in spans:
        found.append(Span(rows, length, start))
        rows += length
        blocks = -(-(start + length) // BLOCK)
        tables.append(list(range(used, used + blocks)))
        used += blocks
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    heads, kv_heads, d = spec.num_heads, spec.num_kv_heads, spec.head_dim
    cache = LayerCache(*(randn(used, BLOCK, kv_heads, d) for _ in range(2)))
    angles = torch.rand(rows, 1, d // 2, generator=generator, device=device)
    plan = AttentionPlan(found, tables, BLOCK, device)
    rotation = Rotation(angles.cos(), angles.sin())
    return Attended(randn(rows, heads + 2 * kv_heads, d), rotation, cache, plan)


def check_layer(device: str, name: str, tolerances: dict[torch.dtype, float]) -> list[str]:
    """Runs every operation beside the oracle; what differs."""
    backend, oracle, wrong = get_backend(device, name), get_backend(device, "reference"), []
    small = msgspec.structs.replace(predictions.LLAMA_8B, num_heads=8, num_kv_heads=2)
    for dtype, tolerance in tolerances.items():
        for window in (None, 50):
            results = []
            for each in (oracle, backend):
                a = attended([(0, 1), (17, 1), (300, 1), (0, 70), (40, 30)], small, dtype, device)
                each.rope_store(a.qkv, None, a.rotation, a.cache, a.plan)
                out = each.paged_attention(a.qkv, a.cache, a.plan, Scores(window))
                hidden = a.qkv[:, :8].flatten(1).clone()
                normed = each.add_rms_norm(hidden, out.clone(), Norm(out[0].clone(), 1e-5))
                results.append(
                    {"rope": a.qkv[:, :8], "keys": a.cache.keys, "values": a.cache.values, "attention": out}
                )
                results[-1] |= {"sum": hidden, "norm": normed, "silu": each.silu_and_mul(hidden)}
            for op, expected in results[0].items():
                difference = (results[1][op].float() - expected.float()).abs().max()
                error = float(difference / expected.float().abs().max())
                if not error <= tolerance:  # NaN, too
                    wrong.append(f"{op}, {dtype}, window {window}: off by {error:.2g} of the largest value")
    return wrong


def layer_table(dtype: torch.dtype, device: str, timer: Timer, bandwidth: float) -> Table:
    """Times of the operations, and of plain torch's."""
    ours, plain = get_backend(device, "triton"), get_backend(device, "torch")
    table = Table(title="a layer of Llama 3 8B beside its linears; times in us")
    for column in ("operation", "case", "time", "of copy", "plain torch"):
        table.add_column(column, justify="left" if column in ("operation", "case") else "right")

    def add(op: str, case: str, nbytes: int, run: Callable[[Backend], object]) -> None:
        seconds, other = timer(partial(run, ours)), timer(partial(run, plain))
        share = f"{nbytes / seconds / bandwidth:.0%}"
        table.add_row(op, case, f"{seconds * 1e6:.1f}", share, f"{other * 1e6:.1f}")

    for rows in (1, 32, 2048):
        hidden, delta = torch.randn(2, rows, predictions.LLAMA_8B.hidden_size, device=device).to(dtype)
        norm = Norm(torch.ones_like(hidden[0]), 1e-5)
        nbytes = 4 * hidden.nbytes
        add("sum and norm", f"{rows} tokens", nbytes, lambda k: k.add_rms_norm(hidden, delta, norm))  # noqa: B023
        wide = torch.randn(rows, 2 * predictions.LLAMA_8B.intermediate_size, device=device).to(dtype)
        add("activation", f"{rows} tokens", 3 * wide.nbytes // 2, lambda k: k.silu_and_mul(wide))  # noqa: B023
    spans = {
        "decode, 1 after 1,000": [(1000, 1)],
        "decode, 1 after 16,000": [(16000, 1)],
        "decode, 32 after 1,000": [(1000, 1)] * 32,
        "prompt of 2,048": [(0, 2048)],
        "512 after 4,096, beside 31 decoding": [(4096, 512), *[(1000, 1)] * 31],
    }
    for case, of in spans.items():
        a = attended(of, predictions.LLAMA_8B, dtype, device)
        nbytes = 2 * a.qkv.nbytes + a.rotation.cos.nbytes * 2
        add("rope and store", case, nbytes, lambda k: k.rope_store(a.qkv, None, *a[1:]))  # noqa: B023
        add("attention", case, a.nbytes, lambda k: k.paged_attention(a.qkv, *a[2:], Scores()))  # noqa: B023
    return table


class Steps:
    """Decode steps of the first layers of Llama 3 8B with random weights, eager and played back."""

    def __init__(
        self,
        dtype: torch.dtype,
        device: str,
        *,
        layers: int,
        most: int,
        context: int,
        adapters: int,
        rank: int,
        record: Record | None = None,
        spec: ModelSpec = predictions.LLAMA_8B,
    ) -> None:
        spec = msgspec.structs.replace(spec, num_layers=layers)
        where = torch.device(device)
        self._context, self._rank = context, rank
        self._blocks = -(-(context + 1) // BLOCK)
        self.decoder = Decoder(spec, dtype, where, get_backend(device, "triton"))
        for name, parameter in self.decoder.parameters().items():
            std = 1 / math.sqrt(parameter.shape[-1])
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=std)
        self.cache = KVCache(spec, most * self._blocks, BLOCK, dtype, where)
        for memory in (*self.cache.k, *self.cache.v):
            memory.normal_()
        self.slots = LoRASlots(spec, adapters, rank, LORA_MODULES, dtype, where)
        layout = self.slots.layout
        shape = image_shape(layout, dict.fromkeys(layout.places, (rank, rank)), (), dtype)
        for slot in range(adapters):
            data = (0.05 * torch.randn(shape.elements)).to(dtype)
            self.slots.write(slot, shape.image(data, rank=rank, digest=""))
        decoder, cache, slots = self.decoder, self.cache, self.slots
        make = partial(
            DecodeSteps,
            lambda inputs: decoder.forward(inputs, cache, slots),
            DecodeLimits(most, context + 1),
            slots,
            block_size=BLOCK,
            vocab_size=spec.vocab_size,
            dtype=dtype,
            device=where,
        )
        self.eager = make(record=lambda step: step)
        self.played = make(record=record or CudaGraphs(where))

    def run(self, steps: DecodeSteps, batch: int, adapters: int) -> Tensor:
        """The logits of ``batch`` sequences that use ``adapters`` adapters evenly (0: none)."""
        work = []
        for i in range(batch):
            slot = i * adapters // batch if adapters else -1
            table = list(range(i * self._blocks, (i + 1) * self._blocks))
            work.append(SequenceWork("", slot, [i], self._context, table, True, SamplingParams(), 0, [], 0))
        logits = steps.run(work, [self._rank] * self.slots.max_loras)
        assert logits is not None
        return logits


def step_table(
    dtype: torch.dtype,
    device: str,
    timer: Timer,
    *,
    name: str,
    layers: int,
    context: int,
    rank: int,
    record: Record | None = None,
    batches: Sequence[int] = (1, 8, 32, 64),
) -> Table:
    """Wall time of decode steps by ``timer``, with and without graphs and adapters, beside the prediction for
    the GPU of this ``name``."""
    table = Table(
        title=f"decode steps, {layers} layers and head of Llama 3 8B, context {context:,}, rank {rank}; ms"
    )
    for column in ("sequences", "adapters", "launched", "played back", "adapters cost", "predicted"):
        table.add_column(column, justify="right")
    gpu, most = predictions.gpu_of(name), max(batches)
    spec = predictions.with_layers(predictions.LLAMA_8B, layers)
    steps = Steps(
        *(dtype, device), layers=layers, most=most, context=context, adapters=min(32, most), rank=rank,
        record=record,
    )  # fmt: skip
    with torch.inference_mode():
        for batch in batches:
            base = 0.0
            for adapters in (0, 1, 8, 32):
                if adapters > batch:
                    continue
                eager = timer(partial(steps.run, steps.eager, batch, adapters))
                played = timer(partial(steps.run, steps.played, batch, adapters))
                base = base or played
                cost = f"{played / base - 1:+.0%}" if adapters else ""
                step = predictions.Step(batch, context, adapters, rank)
                predicted = "" if gpu is None else f"{predictions.step_seconds(gpu, step, spec) * 1e3:.2f}"
                times = (f"{eager * 1e3:.2f}", f"{played * 1e3:.2f}", cost, predicted)
                table.add_row(str(batch), str(adapters), *times)
    return table


def quantized_table(device: str, timer: Timer, *, name: str, rows: int = 64) -> Table:
    """Times of a product with the weights of quantized checkpoints, beside the prediction."""
    n, k, gpu = (
        2 * predictions.LLAMA_8B.intermediate_size,
        predictions.LLAMA_8B.hidden_size,
        predictions.gpu_of(name),
    )
    table = Table(title=f"gate and up of Llama 3 8B from quantized checkpoints, {rows} rows; ms")
    for column in ("weights", "measured", "predicted"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    x = torch.ones(rows, k, dtype=torch.bfloat16, device=device)
    for format in predictions.FORMATS:
        weight = predictions.block_weight(format, n, k, device)
        measured = timer(partial(weight.linear, x, None))
        predicted = (
            "" if gpu is None else f"{predictions.quantized_seconds(gpu, format, rows, n, k) * 1e3:.2f}"
        )
        table.add_row(format, f"{measured * 1e3:.2f}", predicted)
    return table


def check_steps(
    device: str, record: Record | None = None, spec: ModelSpec = predictions.LLAMA_8B
) -> list[str]:
    """Played steps give the logits of launched ones."""
    wrong = []
    steps = Steps(
        torch.float32, device, layers=2, most=5, context=40, adapters=3, rank=8, record=record, spec=spec
    )
    with torch.inference_mode():
        for batch, adapters in ((1, 0), (3, 0), (3, 2), (5, 3)):
            expected = steps.run(steps.eager, batch, adapters).clone()
            error = float((steps.run(steps.played, batch, adapters) - expected).norm() / expected.norm())
            if not error < 1e-5:
                wrong.append(
                    f"a played step of {batch} sequences with {adapters} adapters: off by {error:.2g}"
                )
    return wrong


def wall_seconds(function: Callable[[], object], device: str) -> float:
    """From the call to the last result on the device, as whoever waits for tokens sees it."""
    taken = []
    for _ in range(25):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[5:])
