"""Streams, threads and page-locked memory: which of them the driver is asked for, and where."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fake_cuda import FakeCuda
from support.random_slots import random_image
from support.tiny_models import build_adapter, build_model
from support.trained_tokens import build_trained
from torch import Tensor

from aioengine.adapters.peft.dora import BaseWeights
from aioengine.adapters.store import AdapterStore
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.portable.quantize import quantize
from aioengine.model.buffer import page_locked
from aioengine.model.decode_graphs import CudaGraphs
from aioengine.model.files.hf_config import read_spec
from aioengine.model.linear import WeightRows
from aioengine.model.pooling import Head
from aioengine.model.slots.copy import StreamCopier
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.slots.tokens import TokenTable, TokenTables, TrainedTokens
from aioengine.model.spec import LORA_MODULES

SECOND = torch.device("cuda", 1)


def test_writes_are_ordered_and_in_any_thread_of_the_right_device() -> None:
    """A new thread's current device is the first one; a process that uses it there takes memory of that."""
    with FakeCuda(index=1) as world:
        copier = StreamCopier(SECOND)
        slot, x = (torch.zeros(16, device=SECOND) for _ in range(2))
        world.watch("slot", slot)
        allocate, images = page_locked(SECOND), []
        for number in range(3):
            copier.before_step()
            x += slot  # a step
            copier.after_step()
            told = {"main": 1}  # this thread is not known to have come this far
            with world.in_thread("load", told):
                images.append(allocate(64).view(torch.float32).fill_(number))
                told = world.now()
            with world.in_thread("copy", told):
                copier.write([(slot, images[-1])])
                told = world.now()
            world.hear(told)
        assert (slot == 2).all() and not world.races and not world.wrong_device


def test_what_an_adapter_has_beside_its_slot_is_copied_like_the_slots(tmp_path: Path) -> None:
    """A head, and trained tokens: on the copies' stream, so that no step waits for it and it waits for none,
    and ordered before the steps that read it."""
    device = torch.device("cuda")
    spec = read_spec(build_model(tmp_path, "llama", num_hidden_layers=1))
    rows = torch.randn(2, spec.hidden_size)
    tokens = TrainedTokens(TokenTables(TokenTable((3, 7)), TokenTable((7,), 1), 2), rows)
    with FakeCuda() as world:
        slots = LoRASlots(spec, 1, 4, LORA_MODULES, torch.float32, device, max_tokens=2)
        image = random_image(slots.layout, 4, torch.Generator().manual_seed(0), torch.float32, tokens=tokens)
        before, waits = world.streams[0].clock["steps"], world.waits
        weight, bias = torch.randn(3, spec.hidden_size), torch.ones(3)
        with world.in_thread("copy", world.now()):
            slots.write(0, dataclasses.replace(image, head=Head(weight, bias)))
            told = world.now()
        assert world.streams[0].clock["steps"] == before
        assert world.waits == waits + 1, "once, for the end of all copies"
        world.hear(told)
        (head,), (trained,) = slots.heads, slots.tokens
        assert trained is not None
        assert head is not None and head.bias is not None and head.weight.is_cuda
        world.watch("head", head.weight)
        slots.before_step()
        assert (head.weight.tolist(), head.bias.tolist()) == (weight.tolist(), bias.tolist())
        hidden = torch.zeros(3, spec.hidden_size, device=device)
        trained.embed(torch.tensor([7, 4, 3], device=device), hidden)
        assert torch.equal(hidden.cpu(), torch.stack([rows[1], torch.zeros_like(rows[0]), rows[0]]))
        slots.after_step()
        with world.in_thread("copy", {"main": 1}):
            slots.write(0, image)
        assert slots.heads == [None] and not world.races


def test_a_failed_write_is_waited_for() -> None:
    """What it reads may be freed afterwards."""
    with FakeCuda() as world:
        copier = StreamCopier(torch.device("cuda"))
        good = (torch.zeros(4, device="cuda"), torch.ones(4))
        with pytest.raises(RuntimeError):
            copier.write([good, (torch.zeros(4, device="cuda"), torch.ones(5))])
        assert world.waits and world.thread.clock["stream 1"] >= world.streams[1].clock["stream 1"] - 1


def test_all_recordings_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS keeps a workspace of 32 MiB for each stream that it has seen."""

    @contextlib.contextmanager
    def graph(graph: object, pool: object, stream: object, **_: object) -> Iterator[None]:
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            yield

    class Graph:
        def replay(self) -> None: ...

    with FakeCuda() as world:
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        record, seen = CudaGraphs(torch.device("cuda")), set()
        for _ in range(5):
            record(lambda: seen.add(world.stream.name))
        assert seen == {"stream 1"} and len(world.streams) == 2


def test_dora_computes_beside_the_steps_and_waits_once(tmp_path: Path) -> None:
    """Also where weights are quantized, which are expanded piece after piece."""
    spec = read_spec(build_model(tmp_path / "model", "llama", num_hidden_layers=2))
    modules = ("q_proj", "o_proj", "down_proj")
    built = build_adapter(
        tmp_path / "model", tmp_path / "adapter", target_modules=list(modules), use_dora=True
    )

    def quantized(module: str) -> BlockWeight:
        n, k = spec.linear(module).out_features, spec.linear(module).in_features
        made = quantize("int8", torch.randn(n + 8, k), k)
        return BlockWeight("int8", k=k, dtype=torch.float32, group=k, **made)

    there = {(layer, module): quantized(module) for layer in range(2) for module in modules}

    def read(weights: BaseWeights, stream: torch.cuda.Stream | None) -> Tensor:
        layout = SlotLayout(spec, 16, modules)
        store = AdapterStore(layout, dtype=torch.float32, weights=weights, stream=stream)
        return store.finish(store.begin("a", str(built))).data

    def rows(layer: int, module: str) -> tuple[WeightRows, Tensor]:
        weight = there[layer, module]
        return WeightRows(weight, 8, weight.n), biases[layer, module]

    biases = {key: torch.randn(weight.n - 8) for key, weight in there.items()}
    expected = read(rows, None)
    with FakeCuda() as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr("aioengine.model.linear.PIECE_ELEMENTS", 512)
        for key, weight in there.items():
            moved = {name: tensor.to("cuda") for name, tensor in weight.tensors().items()}
            there[key], biases[key] = dataclasses.replace(weight, **moved), biases[key].to("cuda")
        world.waits, before = 0, world.streams[0].clock["steps"]
        world.live.peak = most = world.live.now
        found = read(rows, torch.cuda.Stream())
        assert world.waits == 1 and world.streams[0].clock["steps"] == before and not world.races
        assert world.live.peak - most < 2 * max(4 * weight.n * weight.k for weight in there.values())
    torch.testing.assert_close(found, expected)


def test_whole_embeddings_are_compared_beside_the_steps(tmp_path: Path) -> None:
    """Piece by piece: each would wait for a step."""
    spec = read_spec(model := build_model(tmp_path / "model", "llama", num_hidden_layers=1))
    built = build_trained(
        model, tmp_path / "adapter", rows=(3, 9), modules_to_save=["lm_head"], target_modules=["q_proj"]
    )
    base = load_file(model / "model.safetensors")["lm_head.weight"]
    with FakeCuda() as world:
        there = base.to("cuda")
        store = AdapterStore(
            SlotLayout(spec, 16, ["q_proj"], max_tokens=4), dtype=torch.float32,
            weights=lambda *_: (WeightRows.of(there), None), stream=torch.cuda.Stream(),
        )  # fmt: skip
        before = world.streams[0].clock["steps"]
        tokens = store.finish(store.begin("a", str(built))).shape.tokens
        assert tokens is not None and tokens.head.ids == (3, 9)
        assert world.streams[0].clock["steps"] == before
