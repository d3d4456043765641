"""Slots in CUDA memory: writes on a stream of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny_models import build_model

from aioengine.model.buffer import page_locked
from aioengine.model.files.hf_config import read_spec
from aioengine.model.slots.image import build_image
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import LORA_MODULES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_write_is_done_when_it_returns_and_steps_see_it(tmp_path: Path) -> None:
    spec = read_spec(build_model(tmp_path, "llama"))
    slots = LoRASlots(spec, 2, 8, LORA_MODULES, torch.float32, torch.device("cuda"))
    for rank in (8, 3):
        tensors = {
            (layer, module): (torch.full((rank, n_in), float(rank)), torch.full((n_out, rank), 1.0))
            for layer in range(spec.num_layers)
            for module in LORA_MODULES
            for n_in, n_out in [spec.linear(module)]
        }
        adapter = SimpleNamespace(rank=rank, digest="", tensors=tensors)
        slots.write(
            1, build_image(slots.layout, adapter, {}, torch.float32, page_locked(torch.device("cuda")))
        )
        slots.copier.before_step()
        for pools in slots.layers:
            for pool in pools.values():
                for j in range(len(pool.modules)):
                    assert pool.a(1, j).shape[0] == rank == pool.b(1, j).shape[1]
                    assert (pool.a(1, j) == rank).all() and (pool.b(1, j) == 1).all()


def test_a_write_goes_on_beside_work_on_the_steps_stream(tmp_path: Path) -> None:
    """It returns although the step's stream is busy, so it does not wait for it."""
    spec = read_spec(build_model(tmp_path, "llama"))
    slots = LoRASlots(spec, 2, 4, ("q_proj",), torch.float32, torch.device("cuda"))
    linear = spec.linear("q_proj")
    pair = (torch.ones(4, linear.in_features), torch.ones(linear.out_features, 4))
    adapter = SimpleNamespace(rank=4, digest="", tensors={(0, "q_proj"): pair})
    image = build_image(slots.layout, adapter, {}, torch.float32, page_locked(torch.device("cuda")))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of the step's stream
    busy = torch.cuda.Event()
    busy.record()
    slots.write(0, image)
    assert not busy.query(), "the write waited for the step"
    slots.copier.before_step()
    assert (slots.layers[0]["qkv"].a(0, 0) == 1).all()
