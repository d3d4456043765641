"""Where tests of the Triton kernels run: in Triton's interpreter (``test_triton.py``), or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
needs_triton = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or TRITON_INTERPRET=1 as test_triton.py sets it",
)


def examples(few: int, many: int) -> int:
    """The number of examples to draw: ``many`` under ``make fuzz``."""
    return many if os.environ.get("AIOENGINE_FUZZ_RUNS") else few
