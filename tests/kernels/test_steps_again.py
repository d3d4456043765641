"""Decode steps that repeat the one before, through the compiled library: what is kept changes no bit."""

from __future__ import annotations

import dataclasses
import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_slots import fill_slot
from support.tiny_models import build_model

from aioengine.kernels.cpu import build
from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec
from aioengine.model.runner import ModelRunner
from aioengine.request import RequestOptions, SamplingParams
from aioengine.step import StepBatch
from aioengine.testing import LIMITS, Sim

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
BLOCKS, RANK = 40, 8


@functools.cache
def model() -> Path:
    return build_model(Path(tempfile.mkdtemp()), "llama")


def runner() -> ModelRunner:
    made = build_runner(
        *(read_spec(model()), model()), dtype=torch.bfloat16, device="cpu", num_blocks=BLOCKS, block_size=16,
        max_loras=LIMITS.num_slots, max_lora_rank=RANK, kernels="cpu",
    )  # fmt: skip
    assert made.lora_slots is not None and made.model.compiled
    generator = torch.Generator().manual_seed(1)
    for slot in range(LIMITS.num_slots):
        fill_slot(made.lora_slots, slot, RANK, generator)
    return made


PARAMS: tuple[dict[str, Any], ...] = (
    *({}, {}, {}, {"temperature": 0.0}, {"temperature": 0.0}, {"temperature": 0.0}),
    *({"temperature": 0.7, "seed": 5}, {"temperature": 0.0, "logprobs": 2}),
    {"temperature": 0.0, "repetition_penalty": 1.3},
)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_changes_no_bit(seed: int) -> None:
    """Random requests come, end, and are aborted and preempted; one runner keeps what it can, and the other
    is given each step as if it were the first."""
    kept, anew = runner(), runner()
    rng = random.Random(seed)
    limits = LIMITS._replace(num_blocks=BLOCKS, block_size=16, max_num_batched_tokens=64, max_model_len=256)
    sim = Sim(limits._replace(prefix_caching=seed % 2 == 0))
    for name in ("a", "b", "c"):
        sim.register(name)
    greedy, again = seed < 2, 0
    for count in range(160):
        if rng.random() < 0.05 or not sim.core.requests:
            adapter = rng.choice((None, "a", "b", "c"))
            entry = None if adapter is None else sim.core.residency.current[adapter]
            prompt = [rng.randrange(5, 200) for _ in range(rng.randrange(1, 60))]
            params = {"temperature": 0.0} if greedy else rng.choice(PARAMS)
            made = SamplingParams(max_tokens=rng.randrange(1, 150), ignore_eos=True, **params)
            sim.core.add_request(str(count), prompt, made, RequestOptions(), sim.now, adapter=entry)
        if rng.random() < 0.02 and sim.core.requests:
            sim.core.end(rng.choice(list(sim.core.requests.values())), "abort", sim.now)
        while sim.loads:
            sim.finish_load()
        while sim.copies:
            sim.finish_copy()
        sim.now += 0.01
        batch = sim.core.schedule(sim.now).batch
        if batch is None:
            continue
        plain = batch._replace(sequences=list(batch.sequences), again=False)
        found, expected = kept.execute(batch), anew.execute(plain)
        assert found._replace(seconds=()) == expected._replace(seconds=())
        again += batch.again
        sim.core.step_finished(batch, found, sim.now)
        sim.core.check()
    assert again > 30


def test_a_sequence_of_other_steps_is_not_continued() -> None:
    """A step that follows another one than the last is computed from what it says."""
    kept, anew = runner(), runner()
    sim = Sim(LIMITS._replace(num_blocks=BLOCKS, block_size=16))
    sim.core.add_request(
        "r", [5, 6, 7], SamplingParams(max_tokens=55, ignore_eos=True), RequestOptions(), 0.0
    )
    for step in range(50):
        batch = sim.core.schedule(0.0).batch
        assert batch is not None
        plain = batch._replace(sequences=list(batch.sequences), again=False)
        expected = anew.execute(plain)
        if step % 5 == 2:
            other = {"request_id": "other", "block_table": [0], "tokens": [9], "start": 0}
            row = dataclasses.replace(plain.sequences[0], **other)
            kept.execute(StepBatch(0, [row], batch.slot_ranks))
        found = kept.execute(batch)
        assert found.tokens == expected.tokens
        sim.core.step_finished(batch, found, 0.0)
