"""Adapters and KV blocks that share a memory and move in it, through the Triton kernels.

In Triton's interpreter, by way of ``test_triton.py``, or on a GPU.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.any_models import build_any
from support.random_slots import random_image
from support.served_models import check, engine_of
from support.tiny_models import build_model
from support.triton_here import DEVICE, examples, needs_triton
from torch import Tensor

from aioengine.events import AdapterShifted, BlocksMoved
from aioengine.model.decode_graphs import DecodeLimits
from aioengine.model.files.resolve import read_spec
from aioengine.model.runner import ModelRunner
from aioengine.model.slots.image import AdapterImage
from aioengine.request import SamplingParams
from aioengine.step import SLOT_GRANULE, MemoryMove, Sampled, SequenceWork, StepBatch

pytest.importorskip("triton")
pytestmark = needs_triton
SEEDS = examples(1, 20)
DTYPE, BLOCK = torch.bfloat16, 4
RANKS = (4, 8, 3)
AFFINE = 2
"""The slot that scales and shifts."""
BLOCKS, KEYS = 256, range(96, 160)
"""Number of blocks, and those that hold keys and values; adapters are below and above."""
BLOCK_BYTES = {"near": 512, "far": 1 << 25}
"""With the second number, half of the places are beyond 2**31 elements. Little of that memory is touched."""


@functools.cache
def model() -> Path:
    return build_model(Path(tempfile.mkdtemp()), "llama", num_hidden_layers=1)


class Run:
    """A runner, and the logits of its last step. With ``block_bytes`` it has one memory."""

    def __init__(self, block_bytes: int | None, *, played: bool) -> None:
        self.logits = torch.empty(0)
        self.runner = ModelRunner(
            *(read_spec(model()), model()), dtype=DTYPE, device=DEVICE, num_blocks=BLOCKS, block_size=BLOCK,
            max_loras=len(RANKS), max_lora_rank=8, kernels="triton", sample=self._sample,
            shared_block_bytes=block_bytes, fixed_decode=DecodeLimits(4, 64) if played else None,
            record=None if DEVICE == "cuda" else lambda step: step,
        )  # fmt: skip
        assert self.runner.lora_slots is not None
        self.slots = self.runner.lora_slots

    def _sample(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        self.logits = logits.cpu()
        return [Sampled(0) for _ in rows]

    def step(
        self, start: int, count: int, tables: list[list[int]], moves: Sequence[MemoryMove] = ()
    ) -> Tensor:
        """Compute ``count`` tokens of the base model's sequence, and of one for each slot."""
        work = []
        for slot, table in enumerate(tables, start=-1):
            ids = [(11 * slot + 7 * position) % 200 + 20 for position in range(start + count)]
            params = SamplingParams()
            work.append(SequenceWork(str(slot), slot, ids[start:], start, table, True, params, 0, ids, 0))
        self.runner.execute(StepBatch(0, work, RANKS, moves))
        return self.logits


class Places:
    """Where everything is in the memory, and moves that put it elsewhere."""

    def __init__(self, block_bytes: int, images: Sequence[AdapterImage], rng: random.Random) -> None:
        self.block_bytes, self.rng = block_bytes, rng
        self.sizes = [-(-image.data.nbytes // SLOT_GRANULE) * SLOT_GRANULE for image in images]
        self.begins: list[int] = []
        for size in self.sizes:
            self.begins.append(self._anywhere(size))
        drawn = rng.sample(KEYS, 12)
        self.tables = [drawn[i::4] for i in range(4)]

    def _anywhere(self, size: int, slot: int | None = None) -> int:
        """Return where ``size`` bytes may begin, so that they overlap none but the adapter in ``slot``."""
        taken = [(at, at + n) for at, n in zip(self.begins, self.sizes, strict=False)]
        if slot is not None:
            del taken[slot]
        taken.append((KEYS.start * self.block_bytes, KEYS.stop * self.block_bytes))
        while True:
            at = self.rng.randrange(0, BLOCKS * self.block_bytes - size + 1, SLOT_GRANULE)
            if slot is not None and self.rng.random() < 0.5:  # so near that both places overlap
                at = self.begins[slot] + self.rng.choice([-2, -1, 1, 2]) * SLOT_GRANULE
            inside = 0 <= at <= BLOCKS * self.block_bytes - size
            if inside and not any(begin < at + size and at < end for begin, end in taken):
                return at

    def move(self, kv_bytes: int) -> list[MemoryMove]:
        """Move each adapter, and a block of each sequence."""
        moves = []
        for table in self.tables:
            used = {block for table in self.tables for block in table}
            i, to = self.rng.randrange(len(table)), self.rng.choice([b for b in KEYS if b not in used])
            moves.append(MemoryMove(to * self.block_bytes, table[i] * self.block_bytes, kv_bytes))
            table[i] = to
        for slot in self.rng.sample(range(len(self.sizes)), len(self.sizes)):
            size, source = self.sizes[slot], self.begins[slot]
            self.begins[slot] = self._anywhere(size, slot)
            moves.append(MemoryMove(self.begins[slot], source, size, slot))
        return moves

    def poison(self, memory: Tensor, kv_bytes: int) -> None:
        """Fill with NaN whatever holds nothing."""
        dead = torch.ones(len(memory), dtype=torch.bool)
        live = [(block * self.block_bytes, kv_bytes) for table in self.tables for block in table]
        for begin, nbytes in (*live, *zip(self.begins, self.sizes, strict=True)):
            dead[begin : begin + nbytes] = False
        memory[dead.to(memory.device)] = 0xFF


@pytest.mark.parametrize(("distance", "played"), [("near", True), ("far", False)])
def test_bits_do_not_depend_on_where_things_are(distance: str, played: bool) -> None:
    """Beside a runner whose adapters and blocks have places of their own, which they keep."""
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        still, moving = Run(None, played=False), Run(BLOCK_BYTES[distance], played=played)
        kv_bytes = BLOCK * moving.runner.spec.kv_bytes_per_token(DTYPE.itemsize)
        images = [
            random_image(still.slots.layout, rank, generator, DTYPE, affine=slot == AFFINE)
            for slot, rank in enumerate(RANKS)
        ]
        places = Places(BLOCK_BYTES[distance], images, random.Random(seed))
        for slot, image in enumerate(images):
            still.slots.write(slot, image)
            moving.slots.write(slot, image, places.begins[slot])
        tables = [list(table) for table in places.tables]
        for start, count in ((0, 5), (5, 1), (6, 1), (7, 1)):
            moves = places.move(kv_bytes) if start else []
            found = moving.step(start, count, places.tables, moves)
            expected = still.step(start, count, tables)
            assert torch.equal(found, expected) and not expected.isnan().any(), f"seed {seed}, {start}"
            if distance == "near":
                assert moving.runner.shared is not None
                places.poison(moving.runner.shared.tensor, kv_bytes)


ENGINES = {
    "by bytes": ("26KiB", "1MiB"),  # both adapters take 29 KiB
    "shared": ("shared", "48KiB"),  # of which a request and an adapter may take all
}
"""``slot_memory``, and memory for the KV cache."""


@pytest.mark.parametrize("slots", ENGINES)
async def test_an_engine_gives_the_tokens_of_peft(
    slots: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of which not all fit are swapped; with one memory, blocks move as well."""
    monkeypatch.setenv("AIOENGINE_KERNELS", "triton")
    model = build_any(tmp_path, "llama", hidden_size=64, head_dim=16)
    slot_memory, memory = ENGINES[slots]
    lora = {"slot_memory": slot_memory, "max_loras": 2, "max_cpu_loras": 2}
    moved: list[AdapterShifted | BlocksMoved] = []
    small = {"max_model_len": 32, "kv_cache_memory": memory, "device": DEVICE}
    async with engine_of(model.folder, model_impl="native", lora=lora, **small) as engine:
        engine.add_listener(moved.append, AdapterShifted, BlocksMoved)
        await check(model, engine)
    assert {type(event) for event in moved} == ({BlocksMoved} if slots == "shared" else set())
