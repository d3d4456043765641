"""Adapters anywhere in the memory of the slots, through the Triton kernels.

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
from support.step_runs import StepRun
from support.tiny_models import build_model
from support.triton_here import DEVICE, examples, needs_triton
from torch import Tensor

from aioengine.core.adapters.arena import GRANULE
from aioengine.model.decode_graphs import DecodeLimits
from aioengine.model.slots.image import AdapterImage

pytest.importorskip("triton")
pytestmark = needs_triton
SEEDS = examples(1, 20)
DTYPE, BLOCK = torch.bfloat16, 4
RANKS = (4, 8, 3)
AFFINE = 2
"""The slot that scales and shifts."""
SLOT_BYTES = {"near": 1 << 17, "far": 1 << 33}
"""With the second number, half of the places are beyond 2**31 elements. Little of that memory is touched."""


@functools.cache
def model() -> Path:
    return build_model(Path(tempfile.mkdtemp()), "llama", num_hidden_layers=1)


class Run(StepRun):
    def __init__(self, slot_memory: int | None, *, played: bool) -> None:
        super().__init__(
            *(model(), RANKS), dtype=DTYPE, device=DEVICE, num_blocks=16, block_size=BLOCK, kernels="triton",
            slot_memory=slot_memory, fixed_decode=DecodeLimits(4, 64) if played else None,
            record=None if DEVICE == "cuda" else lambda step: step,
        )  # fmt: skip
        assert self.runner.lora_slots is not None
        self.slots = self.runner.lora_slots

    def fill_slots(self) -> None:
        """The test does."""

    def step(self, start: int, count: int) -> Tensor:
        """Compute ``count`` tokens of the base model's sequence, and of one for each slot."""
        work = []
        for slot in range(-1, len(RANKS)):
            tokens = [(11 * slot + 7 * position) % 200 + 20 for position in range(start + count)]
            work.append((slot, start, tokens, range(3 * (slot + 1), 3 * (slot + 2))))
        return self.execute(work)


def images_of(run: Run, seed: int) -> list[AdapterImage]:
    """Return the adapters of a seed, prepared for this runner's slots."""
    generator = torch.Generator().manual_seed(seed)
    return [
        random_image(run.slots.layout, rank, generator, DTYPE, affine=slot == AFFINE)
        for slot, rank in enumerate(RANKS)
    ]


def places(images: Sequence[AdapterImage], nbytes: int, rng: random.Random) -> list[int]:
    """Return where each adapter begins, so that none overlaps another."""
    taken: list[tuple[int, int]] = []
    for image in images:
        while True:
            begin = rng.randrange(0, nbytes - image.data.nbytes, GRANULE)
            end = begin + image.data.nbytes
            if not any(begin < last and first < end for first, last in taken):
                break
        taken.append((begin, end))
    return [begin for begin, _ in taken]


@pytest.mark.parametrize(("distance", "played"), [("near", True), ("far", False)])
def test_bits_do_not_depend_on_where_adapters_are(distance: str, played: bool) -> None:
    """Beside a runner whose adapters keep their places, and with NaN wherever nothing is."""
    for seed in range(SEEDS):
        rng = random.Random(seed)
        still, moving = Run(None, played=False), Run(SLOT_BYTES[distance], played=played)
        for slot, image in enumerate(images_of(still, seed)):
            still.slots.write(slot, image)
        images = images_of(moving, seed)
        for start, count in ((0, 5), (5, 1), (6, 1), (7, 1)):
            if distance == "near":
                moving.slots.memory.memory.fill_(float("nan"))
            for slot, begin in enumerate(places(images, SLOT_BYTES[distance], rng)):
                moving.slots.write(slot, images[slot], begin)
            found, expected = moving.step(start, count), still.step(start, count)
            assert torch.equal(found, expected) and not expected.isnan().any(), f"seed {seed}, {start}"


async def test_an_engine_gives_the_tokens_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of which not all fit are swapped."""
    monkeypatch.setenv("AIOENGINE_KERNELS", "triton")
    model = build_any(tmp_path, "llama", hidden_size=64, head_dim=16)
    lora = {"slot_memory": "26KiB", "max_loras": 2, "max_cpu_loras": 2}  # both adapters take 29 KiB
    small = {"max_model_len": 32, "kv_cache_memory": "1MiB", "device": DEVICE}
    async with engine_of(model.folder, model_impl="native", lora=lora, **small) as engine:
        await check(model, engine)
