"""Read in the order of a slot, an adapter is the same, and its image needs no copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_files import SPEC, make, read

from aioengine.adapters.peft.contents import KnownContents, SlotOrder
from aioengine.errors import AdapterInvalid
from aioengine.model.slots.image import build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LORA_MODULES

LAYOUT = SlotLayout(SPEC, 16, LORA_MODULES)
ORDER = SlotOrder(LAYOUT)
WEIGHTS = "adapter_model.safetensors"

CASES: dict[str, dict[str, Any]] = {
    "all": {"target_modules": list(LORA_MODULES)},
    "full rank": {"target_modules": list(LORA_MODULES), "r": 16},
    "some": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "ranks": {"target_modules": list(LORA_MODULES), "rank_pattern": {"q_proj": 9, "up_proj": 1}},
    "scalings": {"target_modules": ["k_proj", "o_proj"], "alpha_pattern": {"k_proj": 4, "o_proj": 1}},
    "another dtype": {"target_modules": ["q_proj", "v_proj"], "dtype": torch.bfloat16},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_adapter(case: str, tmp_path: Path) -> None:
    make(tmp_path, **CASES[case])
    plain = read(tmp_path)
    known = KnownContents()
    for _ in range(2):  # the second time its header is known
        ordered = read(tmp_path, order=ORDER, known=known)
        assert (ordered.rank, ordered.digest) == (plain.rank, plain.digest)
        assert ordered.tensors.keys() == plain.tensors.keys()
        for place, (a, b) in plain.tensors.items():
            torch.testing.assert_close(ordered.tensors[place], (a, b), rtol=0, atol=0)
        ours, theirs = (build_image(LAYOUT, packed, {}, torch.float32) for packed in (ordered, plain))
        assert torch.equal(ours.data, theirs.data)
        assert torch.equal(ours.table, theirs.table)
        assert ordered.in_order is not None and ours.data.data_ptr() == ordered.in_order.data_ptr()


def test_of_two_that_are_alike_each_has_its_own_values(tmp_path: Path) -> None:
    make(tmp_path / "a", target_modules=list(LORA_MODULES))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    save_file({k: v * 2 for k, v in load_file(tmp_path / "a" / WEIGHTS).items()}, tmp_path / "b" / WEIGHTS)
    known = KnownContents()
    a, b = (read(tmp_path / name, order=ORDER, known=known) for name in "ab")
    assert a.digest != b.digest
    for place, matrices in a.tensors.items():
        torch.testing.assert_close(b.tensors[place], tuple(2 * matrix for matrix in matrices))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_bad_values_are_found_in_one_whose_header_is_known(value: float, tmp_path: Path) -> None:
    make(tmp_path, target_modules=list(LORA_MODULES), lora_alpha=400)
    known = KnownContents()
    read(tmp_path, order=ORDER, known=known)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if "layers.1.self_attn.v_proj.lora_B" in key)
    tensors[key][3, 1] = value
    save_file(tensors, tmp_path / WEIGHTS)
    what = "overflow" if value == 3e38 else "NaN or infinity"
    with pytest.raises(AdapterInvalid, match=rf"v_proj.*{what}"):
        read(tmp_path, order=ORDER, known=known)


def test_what_is_known_is_bounded(tmp_path: Path) -> None:
    known = KnownContents()
    for rank in range(1, KnownContents.SIZE + 3):
        make(tmp_path / str(rank), target_modules=["q_proj"], r=rank)
        assert read(tmp_path / str(rank), order=ORDER, known=known).rank == rank
    assert read(tmp_path / "1", order=ORDER, known=known).rank == 1
