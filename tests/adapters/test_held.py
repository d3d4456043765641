"""Files in memory, read as those of a folder are."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.peft_files import CONFIG, SPEC, WEIGHTS, make, read

from aioengine.adapters.peft.held import HeldAdapter, hold_files, hold_tensors
from aioengine.model.parallel.group import SOLO, Shard
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LORA_MODULES

ROOM = 1 << 20


def held(folder: Path) -> HeldAdapter:
    config, weights = ((folder / file).read_bytes() for file in (CONFIG, WEIGHTS))
    return hold_files("sql", "memory:1", config, memoryview(weights), room=ROOM)


@pytest.mark.parametrize("shard", [SOLO, Shard(1, 2), Shard(0, 2, True)], ids=["all", "half", "fully"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_the_same_as_from_a_folder(tmp_path: Path, shard: Shard, options: dict[str, bool]) -> None:
    make(tmp_path, target_modules=list(LORA_MODULES), **options)
    slot = SlotLayout(SPEC, 16, LORA_MODULES, shard)
    adapter = held(tmp_path)
    from_folder = read(tmp_path, slot=slot)
    from_memory = read(Path("memory:1"), slot=slot, files=adapter.files)
    assert from_memory.digest == from_folder.digest
    for place, pair in from_folder.tensors.items():
        assert all(map(torch.equal, pair, from_memory.tensors[place]))


def test_mixed_dtypes_in_any_order(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj", "v_proj"])
    tensors = load_file(tmp_path / WEIGHTS)
    mixed = {
        key: tensor.to([torch.float32, torch.bfloat16, torch.float16][i % 3])
        for i, (key, tensor) in enumerate(tensors.items())
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": {"q_proj", "v_proj"}}
    adapter = hold_tensors("sql", "memory:1", mixed, config, room=ROOM)
    found = read(Path("memory:1"), files=adapter.files)
    for (layer, module), (a, b) in found.tensors.items():
        prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_"
        assert torch.equal(a, mixed[f"{prefix}A.weight"].float())
        assert torch.equal(b, mixed[f"{prefix}B.weight"].float() * 1.5)


def test_nobody_can_change_it_and_it_goes_with_its_last_reference(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"])
    first, second = held(tmp_path), held(tmp_path)
    first.release()
    first.release()
    assert not first.alive and not Path(first.files.weights).exists()
    assert read(Path("memory:1"), files=second.files).rank == 4
    descriptor = int(second.files.weights.rpartition("/")[2])
    assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    with pytest.raises(PermissionError):
        os.write(descriptor, b"x")
    del second
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
