"""A decoder without adapters, whose steps run through torch."""

from __future__ import annotations

import torch

from aioengine.kernels import get_backend
from aioengine.model.decoder import Decoder
from aioengine.model.kv_cache import KVCache
from aioengine.model.spec import ModelSpec


def plain_decoder(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    device = torch.device("cpu")
    return Decoder(spec, dtype, device, get_backend("cpu"), KVCache(spec, 1, 16, dtype, device))
