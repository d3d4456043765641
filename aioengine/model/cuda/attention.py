"""The kernels for a model on a GPU: where two can attend to its prompts, those that take less time there."""

from __future__ import annotations

import torch

from aioengine.kernels import Backend, Scores, get_backend
from aioengine.kernels.dispatch import fastest_backend
from aioengine.kernels.measured import AttentionCase
from aioengine.model.spec import ModelSpec


def fastest_kernels(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device, *, block_size: int, ranks: int
) -> Backend:
    """Return the backend for a model whose cache has its dtype, and which ``ranks`` share. Measures, which
    takes a moment, if there is a choice."""
    if spec.impl != "native" or spec.sinks:
        return get_backend(device.type)
    case = AttentionCase(
        spec.num_heads // ranks,
        max(1, spec.num_kv_heads // ranks),
        spec.head_dim,
        block_size,
        dtype,
        tuple(
            Scores(spec.window(layer), spec.attention_scale, spec.attention_cap)
            for layer in range(spec.num_layers)
        ),
    )
    return fastest_backend(device, case)
