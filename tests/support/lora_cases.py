"""Batches over pools of adapters whose unused slots are poisoned, for the tests of the LoRA operations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import Backend, LoRABatch, LoRAPool, SlotMemory


class Case(NamedTuple):
    """A pool in which unused slots are NaN, and a batch over it."""

    sequences: list[tuple[int, int]]
    """(slot, tokens), sorted."""
    ranks: list[int]
    x: Tensor
    a: Tensor
    b: list[Tensor]
    affine: list[Tensor]
    y: Tensor
    offsets: list[int]
    slot_affine: list[bool]
    """The slots that scale and shift; what ``affine`` holds for the others is NaN."""
    scales: Sequence[float] = ()
    """By which each sequence's adapter is multiplied; if there are none, by one."""

    @property
    def batch(self) -> LoRABatch:
        return LoRABatch(
            [s for s, _ in self.sequences],
            [n for _, n in self.sequences],
            self.ranks,
            self.x.device,
            slot_affine=self.slot_affine,
            scales=self.scales,
        )

    def on(self, device: str) -> Case:
        """A copy on a device."""
        x, a, y = (tensor.to(device, copy=True) for tensor in (self.x, self.a, self.y))
        b, affine = ([tensor.to(device) for tensor in tensors] for tensors in (self.b, self.affine))
        return self._replace(x=x, a=a, b=b, affine=affine, y=y)

    @property
    def pool(self) -> LoRAPool:
        """The adapters one behind the other, the last one first, as long as their ranks; NaN lies between."""
        return self._pool(int8=False)

    @property
    def int8_pool(self) -> LoRAPool:
        """The same in int8: A and B are what :func:`rounded` makes of them."""
        return self._pool(int8=True)

    def _pool(self, *, int8: bool) -> LoRAPool:
        n = len(self.b)
        matrices: dict[tuple[int, int, int], Tensor] = {}
        for slot, rank in enumerate(self.ranks):
            for j in range(n):
                matrices[slot, j, 0] = self.a[slot].chunk(n)[j][:rank]
            for j in range(n):
                matrices[slot, j, 2] = self.b[j][slot, :, :rank]
                if int8:
                    a, b, scale = rounded(matrices[slot, j, 0], matrices[slot, j, 2])
                    matrices[slot, j, 0], matrices[slot, j, 2], matrices[slot, j, 5] = a, b, scale
            for j in range(n):
                if self.slot_affine and self.slot_affine[slot]:
                    matrices[slot, j, 4] = self.affine[j][slot]
        dtype = torch.int8 if int8 else self.a.dtype
        flat = {key: matrix.flatten().view(dtype) for key, matrix in matrices.items()}
        gap = 16
        length = gap + sum(-(-len(m) // gap) * gap + gap for m in flat.values())
        widths = [b.shape[1] for b in self.b]
        numbers = (self.a.shape[2], *widths)
        empty = torch.full((length,), 127 if int8 else float("nan"), dtype=dtype, device=self.a.device)
        slots = SlotMemory(
            empty, len(self.ranks), n, self.a.shape[1] // n,
            aligned=int8 or not any(number % 16 for number in numbers), dtype=self.a.dtype,
        )  # fmt: skip
        begin = gap
        for slot in reversed(range(len(self.ranks))):
            table = torch.tensor([[0, self.ranks[slot], 0, self.ranks[slot], -1, -1]] * n)
            for (of, j, column), matrix in flat.items():
                if of == slot:
                    slots.memory[begin : begin + len(matrix)] = matrix
                    table[j, column] = begin
                    begin += -(-len(matrix) // gap) * gap + gap
            slots.table[slot], rows = slots.rows(table, 0)
            slots.device_table[slot] = rows
        names = tuple(f"slice {j}" for j in range(n))
        offsets = tuple(self.offsets)
        return LoRAPool(slots, names, 0, self.a.shape[2], tuple(widths), offsets, tuple(widths), offsets)

    @property
    def slot_of_token(self) -> list[int]:
        return [slot for slot, count in self.sequences for _ in range(count)]

    @property
    def scale_of_token(self) -> list[float]:
        scales = self.scales or [1.0] * len(self.sequences)
        return [scale for scale, (_, count) in zip(scales, self.sequences, strict=True) for _ in range(count)]

    def alone(self, token: int) -> LoRABatch:
        """The batch of one token."""
        scales = [self.scale_of_token[token]] if self.scales else ()
        return LoRABatch(
            [self.slot_of_token[token]], [1], self.ranks, slot_affine=self.slot_affine, scales=scales
        )


def make_case(
    sequences: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    max_rank: int,
    *,
    n_in: int = 24,
    widths: Sequence[int] = (32, 16, 16),
    targeted: Sequence[int] = (0, 1, 2),
    slot_affine: Sequence[bool] = (),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scales: Sequence[float] = (),
) -> Case:
    """``widths`` are the slices of the fused output, of which the adapters target ``targeted``."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens = sum(count for _, count in sequences)
    used = {slot for slot, count in sequences if count}
    a = randn(len(ranks), len(targeted) * max_rank, n_in)
    b = [randn(len(ranks), widths[j], max_rank) for j in targeted]
    for slot, rank in enumerate(ranks):
        beyond = slice(rank if slot in used else 0, None)
        value = 0.0 if slot in used else float("nan")
        a[slot].view(len(targeted), max_rank, n_in)[:, beyond] = value
        for b_j in b:
            b_j[slot, :, beyond] = value
    affine = [randn(len(ranks), 2, widths[j]) for j in targeted]
    for slot in range(len(ranks)):
        if not (slot_affine and slot_affine[slot]):
            for affine_j in affine:
                affine_j[slot] = float("nan")
    starts = [sum(widths[:j]) for j in targeted]
    y = randn(tokens, sum(widths))
    x = randn(tokens, n_in)
    return Case(sorted(sequences), list(ranks), x, a, b, affine, y, starts, list(slot_affine), scales)


def rounded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers for A [rank, in] and B [out, rank], and a scale [rank]; kernels take any."""
    scale = (a.abs().amax(1) / 127).float().nan_to_num(1.0)
    whole = (a.float() / scale[:, None]).nan_to_num(0.0).round().to(torch.int8)
    return whole, (b.float() * 40).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8), scale / 40


def turned(pool: LoRAPool) -> LoRAPool:
    """A copy whose matrices B are turned."""
    slots = copy.copy(pool.slots)
    slots.memory, slots.turned = pool.slots.memory.clone(), True
    for rows in slots.table:
        slots.turn(rows, pool.widths)
    return pool._replace(slots=slots)


def apply(backend: Backend, case: Case, device: str = "cpu", *, int8: bool = False) -> tuple[Tensor, Tensor]:
    """h, and y after all operations."""
    case = case.on(device)
    batch, pool = case.batch, case.int8_pool if int8 else case.pool
    h = backend.lora_shrink(case.x, pool, batch)
    backend.lora_expand(h, pool, case.y, batch)
    backend.lora_affine(case.y, pool, batch)
    return h.cpu(), case.y.cpu()
