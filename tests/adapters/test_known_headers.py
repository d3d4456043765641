"""What was derived from a header is used for the next file with the same one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_files import WEIGHTS, edit_weights, make, read, refused

from aioengine.adapters.peft.read import MAX_KNOWN, KnownPlans
from aioengine.model.spec import LORA_MODULES


def test_of_two_that_are_alike_each_has_its_own_values(tmp_path: Path) -> None:
    make(tmp_path / "a", target_modules=list(LORA_MODULES))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file({k: v * 2 for k, v in load_file(tmp_path / "a" / WEIGHTS).items()}, tmp_path / "b" / WEIGHTS)
    known: KnownPlans = {}
    a, b = (read(tmp_path / name, known=known) for name in "ab")
    assert a.digest != b.digest
    for place, matrices in a.tensors.items():
        torch.testing.assert_close(b.tensors[place], tuple(2 * matrix for matrix in matrices))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_bad_values_are_found_in_one_whose_header_is_known(value: float, tmp_path: Path) -> None:
    make(tmp_path, target_modules=list(LORA_MODULES), lora_alpha=400)
    known: KnownPlans = {}
    read(tmp_path, known=known)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if "layers.1.self_attn.v_proj.lora_B" in key)
        tensors[key][3, 1] = value

    edit_weights(tmp_path, spoil)
    refused(tmp_path, "v_proj", "overflow" if value == 3e38 else "NaN or infinity", known=known)


def test_what_is_known_is_bounded(tmp_path: Path) -> None:
    known: KnownPlans = {}
    for rank in (*range(1, MAX_KNOWN + 3), 1):
        make(tmp_path / str(rank), target_modules=["q_proj"], r=rank)
        assert read(tmp_path / str(rank), known=known).rank == rank
        assert len(known) <= MAX_KNOWN
