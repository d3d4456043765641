"""A token's logits are the same bits in any company: in any batch, chunk, slot, and number of threads."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.invariant_steps import InvariantSteps, make_sequences, random_steps
from support.selection import mostly_slow_rows
from support.tiny_models import build_model
from torch import Tensor

from aioengine.kernels.cpu import build
from aioengine.model.spec import Quantization

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")

OTHERS = [
    ("llama", torch.bfloat16, "int8", False, torch.int8),
    ("qwen2", torch.bfloat16, "none", False, torch.bfloat16),
]
"""Families without windows and caps."""


@functools.cache
def model(family: str) -> Path:
    return build_model(Path(tempfile.mkdtemp()), family)


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("level", "_threads")
@pytest.mark.parametrize(
    ("family", "dtype", "quantization", "int8_cache", "lora_dtype"),
    mostly_slow_rows(
        [
            ("gemma2", torch.float32, "none", False, torch.float32),
            ("gemma2", torch.bfloat16, "none", False, torch.bfloat16),
            ("gemma2", torch.bfloat16, "int8", True, torch.bfloat16),
            ("gemma2", torch.float32, "none", False, torch.int8),
            ("gemma2", torch.bfloat16, "int8", False, torch.int8),
            ("gemma2", torch.bfloat16, "int4", False, torch.bfloat16),
            *OTHERS,
        ],
        ("gemma2", torch.bfloat16, "none", False, torch.bfloat16),
        ("gemma2", torch.bfloat16, "int8", True, torch.bfloat16),
        ("gemma2", torch.bfloat16, "int4", False, torch.bfloat16),
    ),
)
def test_logits_do_not_depend_on_the_batch(
    family: str, dtype: torch.dtype, quantization: Quantization, int8_cache: bool, lora_dtype: torch.dtype
) -> None:
    steps = InvariantSteps(
        model(family), dtype, "cpu", quantization, int8_cache=int8_cache, lora_dtype=lora_dtype
    )
    assert steps.runner.model.compiled
    sequences = make_sequences(0)
    torch.set_num_threads(1)
    alone = [steps.alone(sequence) for sequence in sequences]
    seen = 0

    def found(sequence: int, token: int, logits: Tensor) -> None:
        nonlocal seen
        seen += 1
        assert torch.equal(logits, alone[sequence][token]), (sequences[sequence].adapter, token, seen)

    random_steps(steps, sequences, random.Random(1), 120, torch.set_num_threads, found)
    assert seen > 200
