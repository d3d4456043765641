"""PEFT's methods: each is served exactly, folded exactly, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.peft_files import CONFIG, WEIGHTS, edit_config, edit_weights, read, refused
from support.peft_methods import FOLDED, changes, save

from aioengine.errors import AdapterTooLarge

pytestmark = pytest.mark.filterwarnings("ignore")


OTHERS = sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"LORA", *FOLDED})
INITIAL = {True: "gaussian orthogonal eva", False: "pissa olora corda loftq"}
"""Ways to begin with ``init_lora_weights``: whether what is saved is the whole change of the weights."""


@pytest.mark.parametrize("method", OTHERS)
def test_no_other_method_is_taken_for_lora(adapter: Path, method: str) -> None:
    edit_config(adapter, peft_type=method)
    refused(adapter, CONFIG, "peft_type", method)


@pytest.mark.parametrize("served", INITIAL)
def test_ways_to_begin(adapter: Path, served: bool) -> None:
    for way in INITIAL[served].split():
        edit_config(adapter, init_lora_weights=way)
        if served:
            read(adapter)
        else:
            refused(adapter, CONFIG, "init_lora_weights", way)


@pytest.mark.parametrize("method", sorted(FOLDED))
def test_a_folded_adapter_changes_weights_as_peft_does(tmp_path: Path, method: str) -> None:
    expected = changes(save(tmp_path, method, **FOLDED[method]))
    packed = read(tmp_path)
    assert packed.tensors.keys() == expected.keys() and packed.rank > 1
    for place, (a, b) in packed.tensors.items():
        assert expected[place].abs().max() > 0.01
        torch.testing.assert_close(b @ a, expected[place])


def test_ranks_and_alphas_of_single_modules(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 4}, "alpha_pattern": {"v_proj": 7}}
    expected = changes(save(tmp_path, "LOHA", r=3, alpha=5, **patterns))
    packed = read(tmp_path)
    assert {place: len(a) for place, (a, _) in packed.tensors.items()} == {
        (layer, module): {"q_proj": 4, "v_proj": 9, "up_proj": 16 if layer else 9}[module]
        for layer, module in expected
    }
    for place, (a, b) in packed.tensors.items():
        torch.testing.assert_close(b @ a, expected[place])


@pytest.mark.parametrize("options", [{"decompose_both": True}, {"decompose_factor": 2}, {"r": 64}])
def test_kronecker_factors_whole_and_in_two(tmp_path: Path, options: dict[str, int]) -> None:
    expected = changes(save(tmp_path, "LOKR", **{"r": 1, "alpha": 3, **options}))
    packed = read(tmp_path, max_rank=64)
    for place, (a, b) in packed.tensors.items():
        torch.testing.assert_close(b @ a, expected[place])


def test_a_pruned_adalora_module_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, "ADALORA", **FOLDED["ADALORA"])
    pruned = "base_model.model.model.layers.0.self_attn.q_proj.lora_"

    def prune(tensors: dict[str, torch.Tensor]) -> None:
        for name, axis in (("A", 0), ("B", 1), ("E", 0)):
            tensors[pruned + name] = tensors[pruned + name].narrow(axis, 0, 0).contiguous()

    edit_weights(tmp_path, prune)
    a, b = read(tmp_path).tensors[0, "q_proj"]
    assert not (b @ a).any()


def test_a_folded_rank_that_no_slot_has_room_for(tmp_path: Path) -> None:
    save(tmp_path, "LOHA", r=5, alpha=5)
    refused(tmp_path, "rank 25", "max_lora_rank is 16", kind=AdapterTooLarge)


def test_what_is_wrong_with_a_folded_adapter_is_said(tmp_path: Path) -> None:
    save(tmp_path, "VERA", **FOLDED["VERA"])
    whole = (tmp_path / WEIGHTS).read_bytes()
    key = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"

    edit_weights(tmp_path, lambda tensors: tensors.pop("base_model.vera_A"))
    refused(tmp_path, "base_model.vera_A", "save_projection=True")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors.pop(key))
    refused(tmp_path, "model.layers.0.self_attn.q_proj", "do not fit")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors.update({key: torch.zeros(3)}))
    refused(tmp_path, "vera_lambda_b [3]")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors.update({key.replace("vera", "hada"): torch.zeros(3)}))
    refused(tmp_path, "unknown key", "hada_lambda_b")
    (tmp_path / WEIGHTS).write_bytes(whole)
    for fields in ({"target_modules": ["q_proj"]}, {"bias": "all"}, {"use_dora": True}, {"new_field": 3}):
        before = (tmp_path / CONFIG).read_text()
        edit_config(tmp_path, **fields)
        refused(tmp_path)
        (tmp_path / CONFIG).write_text(before)
    edit_config(tmp_path, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    refused(tmp_path, "down_proj", "no weights for it")
