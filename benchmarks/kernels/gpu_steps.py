"""Work of a layer beside its linears and adapters, and whole steps, on a GPU; for ``gpu.py``."""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from aioengine.kernels import (
    AttentionPlan,
    Backend,
    LayerCache,
    LoRABatch,
    Norm,
    PlainWeight,
    Rotation,
    Scores,
    Span,
    Weight,
    get_backend,
)
from aioengine.kernels.transfer import send
from aioengine.model.decode_graphs import CudaGraphs, DecodeLimits, DecodeSteps, Record
from aioengine.model.decoder import Decoder, StepInputs
from aioengine.model.kv_cache import KVCache
from aioengine.model.slots.image import image_shape
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import LORA_MODULES, ModelSpec
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork
from benchmarks.kernels.gpu_machine import Machine
from benchmarks.kernels.predictions import (
    FORMS,
    LLAMA_8B,
    Form,
    Kernel,
    Step,
    block_weight,
    product,
    prompt_seconds,
    quantized_product,
    step_seconds,
    with_layers,
)
from benchmarks.kernels.sheets import Row, Sheet, Wrong, against

BLOCK = 16
CHECKED = ((0, 1), (17, 1), (300, 1), (0, 70), (40, 30))
"""Sequences whose operations are compared with the oracle's, as (positions in the cache, tokens)."""
BESIDE = 32
"""Sequences of a batch whose operations are timed."""


class Attended(NamedTuple):
    """A step's queries, keys and values over a cache."""

    qkv: Tensor
    rotation: Rotation
    cache: LayerCache
    plan: AttentionPlan

    @property
    def nbytes(self) -> int:
        """Bytes that attention must read and write at least: queries, what is cached, outputs."""
        cached = sum(span.start + span.length for span in self.plan.spans) * self.cache.keys[0, 0].nbytes
        return 2 * (self.qkv[:, : -2 * self.cache.keys.shape[2]].nbytes + cached)


def attended(
    spans: Sequence[tuple[int, int]], spec: ModelSpec, dtype: torch.dtype, device: str, *, fp8: bool = False
) -> Attended:
    """Sequences as (positions in the cache, tokens), over a cache in ``dtype`` or in float8."""
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
    if fp8:
        cache = LayerCache(*(numbers.to(torch.float8_e4m3fn).view(torch.uint8) for numbers in cache))
    angles = torch.rand(rows, 1, d // 2, generator=generator, device=device)
    plan = AttentionPlan(found, tables, BLOCK, device)
    rotation = Rotation(angles.cos(), angles.sin())
    return Attended(randn(rows, heads + 2 * kv_heads, d), rotation, cache, plan)


def layer_checks(machine: Machine, tolerances: dict[torch.dtype, float]) -> Iterator[Row]:
    """Compare every operation with the oracle."""
    small = msgspec.structs.replace(machine.spec, num_heads=8, num_kv_heads=2)
    for dtype, tolerance in tolerances.items():
        for window in (None, 50):
            check = partial(_layer_error, machine.device, small, dtype, tolerance, window)
            case = f"{str(dtype).removeprefix('torch.')}, window {window or 'none'}"
            yield Row(("attention, rope, norm, activation", case), check)


def _layer_error(
    device: str, spec: ModelSpec, dtype: torch.dtype, tolerance: float, window: int | None
) -> tuple[str]:
    results: list[dict[str, Tensor]] = []
    # The same for both: what was rounded differently before would differ by more.
    given = attended(CHECKED, spec, dtype, device).qkv[:, :8].flatten(1)
    delta = given.flip(0)
    for each in (get_backend(device, "reference"), get_backend(device, "triton")):
        a = attended(CHECKED, spec, dtype, device)
        each.rope_store(a.qkv, None, a.rotation, a.cache, a.plan)
        out = each.paged_attention(a.qkv, a.cache, a.plan, Scores(window))
        hidden = given.clone()
        normed = each.add_rms_norm(hidden, delta.clone(), Norm(given[0].clone(), 1e-5))
        results.append({"rope": a.qkv[:, :8], "attention": out})
        results[-1] |= {"keys": a.cache.keys, "values": a.cache.values}
        results[-1] |= {"sum": hidden, "norm": normed, "silu": each.silu_and_mul(given.clone())}
    largest = 0.0
    for op, expected in results[0].items():
        difference = (results[1][op].float() - expected.float()).abs().max()
        error = float(difference / expected.float().abs().max())
        largest = max(largest, error)
        if not error <= tolerance:  # NaN, too
            raise Wrong(f"{op}, {dtype}, window {window}: off by {error:.2g} of the largest value")
    return (f"{largest:.1g}",)


def _spans(contexts: Sequence[int], prompts: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """Sequences that attend, as (positions in the cache, tokens)."""
    short, long = min(contexts), max(contexts)
    chunk = min(prompts)
    return {
        **{f"decode, 1 after {context:,}": [(context, 1)] for context in contexts},
        f"decode, {BESIDE} after {short:,}": [(short, 1)] * BESIDE,
        **{f"prompt of {tokens:,}": [(0, tokens)] for tokens in prompts},
        f"{chunk:,} after {long:,}, beside {BESIDE - 1} decoding": [
            (long, chunk),
            *[(short, 1)] * (BESIDE - 1),
        ],
    }


def layer_sheet(args: argparse.Namespace, machine: Machine) -> Iterator[Sheet]:
    """Times of the operations, and of plain torch's."""
    dtype: torch.dtype = getattr(torch, args.dtype)
    columns = ("operation", "case", "time", "predicted", "ratio", "plain torch")
    yield Sheet("A layer beside its linears; us", columns, _layer_rows(args, machine, dtype))


def _layer_rows(args: argparse.Namespace, machine: Machine, dtype: torch.dtype) -> Iterator[Row]:
    device, spec = machine.device, machine.spec

    def row(op: str, case: str, kernel: Kernel, run: Callable[[Backend], object]) -> Row:
        def measure() -> tuple[str, ...]:
            ours = machine.seconds(partial(run, get_backend(device, "triton")))
            plain = machine.seconds(partial(run, get_backend(device, "torch")))
            return (*against(ours, machine.predicted(kernel), 1e-6), f"{plain * 1e6:.1f}")

        return Row((op, case), measure)

    for rows in args.tokens:
        hidden, delta = torch.randn(2, rows, spec.hidden_size, device=device).to(dtype)
        weight, wide = (
            torch.ones_like(hidden[0]),
            torch.randn(rows, 2 * spec.intermediate_size, device=device),
        )
        wide = wide.to(dtype)
        kernel = Kernel("norm", 4 * hidden.nbytes)
        yield row("sum and norm", f"{rows} tokens", kernel, _norm(hidden, delta, weight))
        kernel = Kernel("activate", 3 * wide.nbytes // 2)
        yield row("activation", f"{rows} tokens", kernel, lambda k: k.silu_and_mul(wide))  # noqa: B023
    for case, of in _spans(args.contexts, args.prompts).items():
        a = attended(of, spec, dtype, device)
        kernel = Kernel("rope", 2 * a.qkv.nbytes + a.rotation.cos.nbytes * 2)
        yield row("rope and store", case, kernel, lambda k: k.rope_store(a.qkv, None, *a[1:]))  # noqa: B023
        pairs = sum(n * start + n * (n + 1) / 2 for start, n in of if n > 1)
        for op, b in (("attention", a), ("the same, fp8 cache", attended(of, spec, dtype, device, fp8=True))):
            kernel = Kernel("attention", b.nbytes, flops=4.0 * pairs * spec.q_size)
            yield row(op, case, kernel, lambda k: k.paged_attention(b.qkv, *b[2:], Scores()))  # noqa: B023


def _norm(hidden: Tensor, delta: Tensor, weight: Tensor) -> Callable[[Backend], object]:
    """Return the operation, which adds to ``hidden`` in each turn: a little, or it would overflow."""
    little = delta * 1e-3
    norm = Norm(weight, 1e-5)
    return lambda kernels: kernels.add_rms_norm(hidden, little, norm)


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
        spec: ModelSpec = LLAMA_8B,
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
        data = (0.05 * torch.randn(shape.elements)).to(dtype)  # one for all slots: it takes long to draw
        for slot in range(adapters):
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
        """Steps that are launched one operation after the other."""
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

    def prompt(self, tokens: int) -> Tensor:
        """The logits after a prompt of so many tokens, without adapters."""
        device = self.decoder.device
        (rows,) = send([torch.tensor([tokens - 1])], device)
        blocks = list(range(-(-tokens // BLOCK)))
        ranks = [self._rank] * self.slots.max_loras
        inputs = StepInputs(
            torch.zeros(tokens, dtype=torch.int64, device=device),
            rows,
            AttentionPlan([Span(0, tokens, 0)], [blocks], BLOCK, device),
            LoRABatch([-1], [tokens], ranks, device),
            LoRABatch([-1], [1], ranks, device),
        )
        return self.decoder.forward(inputs, self.cache, self.slots)


def step_sheets(args: argparse.Namespace, machine: Machine) -> Iterator[Sheet]:
    """Wall time of decode steps, with and without graphs and adapters."""
    for context in args.contexts:
        for rank in args.step_ranks:
            title = f"Decode steps, {args.layers} layers and head, context {context:,}, rank {rank}; ms"
            columns = ("sequences", "adapters", "launched", "played back", "predicted", "ratio")
            yield Sheet(title, columns, _step_rows(args, machine, context, rank))


def _step_rows(args: argparse.Namespace, machine: Machine, context: int, rank: int) -> Iterator[Row]:
    gc.collect()  # steps that were recorded before refer to themselves
    dtype, most = getattr(torch, args.dtype), max(args.batches)
    spec = with_layers(machine.spec, args.layers)
    steps = Steps(
        *(dtype, machine.device), layers=args.layers, most=most, context=context, adapters=min(32, most),
        rank=rank, record=machine.record, spec=spec,
    )  # fmt: skip

    @torch.inference_mode()
    def measure(batch: int, adapters: int) -> tuple[str, ...]:
        eager = machine.wall(partial(steps.run, steps.eager, batch, adapters))
        played = machine.wall(partial(steps.run, steps.played, batch, adapters))
        step = Step(batch, context, adapters, rank)
        predicted = None if machine.gpu is None else step_seconds(machine.gpu, step, spec)
        return (f"{eager * 1e3:.2f}", *against(played, predicted, 1e-3))

    for batch in args.batches:
        for adapters in (0, 1, 8, 32):
            if adapters <= batch:
                yield Row((str(batch), str(adapters)), partial(measure, batch, adapters))


def prompt_sheet(args: argparse.Namespace, machine: Machine) -> Iterator[Sheet]:
    """Wall time of whole prompts without adapters."""
    columns = ("tokens", "measured", "predicted", "ratio")
    yield Sheet(f"Prompts, {args.layers} layers; ms", columns, _prompt_rows(args, machine))


def _prompt_rows(args: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    gc.collect()
    spec = with_layers(machine.spec, args.layers)
    steps = Steps(
        *(getattr(torch, args.dtype), machine.device), layers=args.layers, most=1,
        context=max(args.prompts), adapters=1, rank=16, record=lambda step: step, spec=spec,
    )  # fmt: skip

    @torch.inference_mode()
    def measure(tokens: int) -> tuple[str, ...]:
        predicted = None if machine.gpu is None else prompt_seconds(machine.gpu, tokens, spec)
        return against(machine.wall(partial(steps.prompt, tokens)), predicted, 1e-3)

    for tokens in args.prompts:
        yield Row((f"{tokens:,}",), partial(measure, tokens))


def product_sheet(args: argparse.Namespace, machine: Machine) -> Iterator[Sheet]:
    """Times of a product with plain weights, and with quantized ones."""
    n, k = 2 * machine.spec.intermediate_size, machine.spec.hidden_size
    capability = 90 if machine.gpu is None else machine.gpu.capability

    def measure(form: Form | None, rows: int) -> tuple[str, ...]:
        x = torch.ones(rows, k, dtype=torch.bfloat16, device=machine.device)
        if form is None:
            weight: Weight = PlainWeight(x.new_ones(n, k))
            kernels = [product("plain", rows, k, n)]
        else:
            weight = block_weight(form, n, k, machine.device)
            kernels = quantized_product(form, rows, k, n, capability)
        linear = get_backend(machine.device, "triton").linear
        taken = machine.seconds(partial(linear, x, weight, None))
        return against(taken, machine.predicted(*kernels), 1e-3)

    columns = ("weights", "rows", "measured", "predicted", "ratio")
    rows = (
        Row(("bfloat16" if form is None else form.name, str(rows)), partial(measure, form, rows))
        for form in (None, *FORMS)
        for rows in args.tokens
    )
    yield Sheet("Gate and up with quantized weights; ms", columns, rows)


def step_checks(machine: Machine, layers: int) -> Iterator[Row]:
    """Compare the logits of played steps with those of launched ones, in two layers or fewer."""
    steps = Steps(
        *(torch.float32, machine.device), layers=min(2, layers), most=5, context=40, adapters=3, rank=8,
        record=machine.record, spec=machine.spec,
    )  # fmt: skip

    @torch.inference_mode()
    def check(batch: int, adapters: int) -> tuple[str]:
        expected = steps.run(steps.eager, batch, adapters).clone()
        error = float((steps.run(steps.played, batch, adapters) - expected).norm() / expected.norm())
        if not error < 1e-5:
            raise Wrong(f"a played step of {batch} sequences with {adapters} adapters: off by {error:.2g}")
        return (f"{error:.1g}",)

    for batch, adapters in ((1, 0), (3, 0), (3, 2), (5, 3)):
        yield Row(("played step", f"{batch} sequences, {adapters} adapters"), partial(check, batch, adapters))
