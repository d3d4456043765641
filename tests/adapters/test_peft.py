from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.peft_files import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    edit_config,
    edit_weights,
    make,
    peft_deltas,
    read,
    refused,
)

from aioengine.errors import AdapterError, AdapterInvalid, AdapterLoadError, AdapterTooLarge
from aioengine.model.spec import LORA_MODULES

ALL = list(LORA_MODULES)
EQUIVALENT: dict[str, dict[str, Any]] = {
    "all modules": {"target_modules": ALL},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "rank 3": {"target_modules": ALL, "r": 3, "lora_alpha": 16},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "patterns": {
        "target_modules": ALL,
        "rank_pattern": {"^model.layers.0.mlp.up_proj": 5, r"layers\.1\.mlp\..*": 7, "q_proj": 2},
        "alpha_pattern": {".*v_proj": 32, "model.layers.1.self_attn.v_proj": 1, "q_proj": 3},
    },
    "patterns with rslora": {
        "target_modules": ALL,
        "use_rslora": True,
        # PEFT sorts the keys when it saves, and the first match counts.
        "rank_pattern": {".*1.mlp.down_proj": 9, "down_proj": 5},
        "alpha_pattern": {"layers.0.*": 11},
    },
    "patterns with wildcards": {
        "target_modules": ALL,
        "rank_pattern": {r".*q_proj": 3, "^model.layers.0.*": 5, "v.proj": 6},
        "alpha_pattern": {r"[qv]_proj": 9},
    },
    "regex": {"target_modules": r".*\.1\.self_attn\.(q|k)_proj|.*down_proj"},
    "regex, excluded": {"target_modules": r".*\.(0|1)\..*_proj", "exclude_modules": r".*(mlp|o_proj).*"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    "excluded by regex": {"target_modules": ALL, "exclude_modules": r".*\.0\.mlp\..*"},
    "one layer": {"target_modules": ALL, "layers_to_transform": 1},
    "layers with a pattern": {
        "target_modules": ALL,
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "layers with several patterns": {
        "target_modules": ALL,
        "layers_to_transform": [1],
        "layers_pattern": ["h", "lay.rs"],
    },
    "full names": {"target_modules": ["model.layers.0.mlp.gate_proj", "layers.1.self_attn.o_proj"]},
    "fan_in_fan_out": {"target_modules": ["q_proj"], "fan_in_fan_out": True},
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("options", EQUIVALENT.values(), ids=EQUIVALENT.keys())
@pytest.mark.slow
def test_same_deltas_as_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    make(tmp_path, **options)
    expected = peft_deltas(tmp_path)
    packed = read(tmp_path)
    assert packed.tensors.keys() == expected.keys()
    for place, (a, b) in packed.tensors.items():
        torch.testing.assert_close(b @ a, expected[place])
        assert a.is_contiguous()
        assert b.is_contiguous()
    assert packed.rank == max(a.shape[0] for a, _ in packed.tensors.values())


def test_literal_all_linear(tmp_path: Path) -> None:
    """PEFT expands the word on saving; files written by other tools keep it."""
    make(tmp_path, target_modules=ALL)
    expected = peft_deltas(tmp_path)
    edit_config(tmp_path, target_modules="all-linear")
    assert read(tmp_path).tensors.keys() == expected.keys()
    edit_weights(tmp_path, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.up_proj" in k])
    refused(tmp_path, "model.layers.1.mlp.up_proj", "no weights")


def test_keys_with_the_adapter_name(adapter: Path) -> None:
    expected = read(adapter)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    edit_weights(adapter, rename)
    actual = read(adapter)
    assert actual.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(actual.tensors[p][1], expected.tensors[p][1]) for p in actual.tensors)
    assert actual.digest != expected.digest


def test_a_bin_file_is_not_read_and_the_error_says_how_to_convert_it(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read(adapter)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    with pytest.raises(AdapterInvalid, match="safe_serialization=True") as refusal:
        read(adapter)
    converted = re.search(r"safetensors\.torch\.save_file\(.*\)", str(refusal.value))
    assert converted is not None
    monkeypatch.chdir(adapter)
    eval(converted[0], {"safetensors": safetensors, "torch": torch})
    for place, (a, b) in read(adapter).tensors.items():
        assert torch.equal(expected.tensors[place][0], a)
        assert torch.equal(expected.tensors[place][1], b)


UNSUPPORTED: dict[str, Any] = {
    "use_dora": "yes",
    "lora_bias": "yes",
    "ensure_weight_tying": 1,
    "layer_replication": [[0, 2]],
    "target_parameters": ["experts.gate"],
    "megatron_config": {"x": 1},
    "use_qalora": True,
    "kasa_config": {"x": 1},
    "init_lora_weights": "pissa_niter_4",
    "some_future_variant": True,
    "r": None,
    "lora_alpha": None,
    "rank_pattern": {"q_proj": 0},
    "alpha_pattern": {"q_proj": "2"},
    "target_modules": None,
    "use_rslora": "yes",
    "layers_to_transform": ["0"],
    "layers_pattern": "layers",
    "exclude_modules": {"a": 1},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_or_malformed_config(adapter: Path, field: str) -> None:
    edit_config(adapter, **{field: UNSUPPORTED[field]})
    refused(adapter, CONFIG, field)


@pytest.mark.parametrize("value", [-1, 0, 1.5, "8", True])
def test_bad_rank(adapter: Path, value: object) -> None:
    edit_config(adapter, r=value)
    refused(adapter, CONFIG, "r=")


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "[" * 50000, "\xff"])
def test_config_that_is_no_json_object(adapter: Path, content: str) -> None:
    (adapter / CONFIG).write_bytes(content.encode("latin-1"))
    refused(adapter, CONFIG)


def test_config_and_file_disagree(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q_proj"])
    refused(adapter, WEIGHTS, "down_proj", "does not target")
    edit_config(adapter, target_modules=["q_proj", "down_proj", "k_proj"])
    refused(adapter, WEIGHTS, "k_proj", "no weights")
    edit_config(adapter, target_modules=["q_proj", "down_proj", "lm_head"])
    refused(adapter, WEIGHTS, "lm_head", "no weights")
    edit_config(adapter, target_modules=["q_proj", "down_proj"], use_dora=True, lora_bias=True)
    refused(adapter, CONFIG, "use_dora and lora_bias")


def test_module_that_the_pool_does_not_hold(adapter: Path) -> None:
    refused(adapter, "down_proj", "target_modules", target_modules=("q_proj", "v_proj"))


def test_rank_over_the_bound(adapter: Path) -> None:
    refused(adapter, "rank 4", "max_lora_rank is 2", kind=AdapterTooLarge, max_rank=2)
    edit_config(adapter, rank_pattern={"down_proj": 32})
    refused(adapter, "mlp.down_proj has rank 32", kind=AdapterTooLarge)


@pytest.mark.parametrize(
    ("key", "shape", "words"),
    [
        (f"{PREFIX}.lora_A.weight", [4, 31], ["[4, 32]", "[4, 31]"]),
        (f"{PREFIX}.lora_B.weight", [32, 5], ["[32, 4]", "[32, 5]"]),
        (f"{PREFIX}.lora_A.weight", [4], ["[4, 32]", "[4]"]),
        (f"{PREFIX}.lora_A.default.weight", [4, 32], ["same weight"]),
        (f"{PREFIX}.lora_B.bias", [32], ["bias"]),
        (f"{PREFIX}.lora_magnitude_vector", [32], ["use_dora"]),
        ("base_model.model.lm_head.lora_A.weight", [4, 32], ["lm_head"]),
        ("base_model.model.model.embed_tokens.lora_embedding_A", [4, 64], ["embedding"]),
        (
            "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
            [4, 32],
            ["unknown key", "in one of 2 layers"],
        ),
        ("base_model.model.model.layers.0.mlp.q_proj.lora_A.weight", [4, 32], ["unknown key"]),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", [4, 32], ["k_proj"]),
        ("something.else", [1], ["unknown key"]),
    ],
)
def test_wrong_tensors(adapter: Path, key: str, shape: list[int], words: list[str]) -> None:
    edit_weights(adapter, lambda tensors: tensors.update({key: torch.ones(shape)}))
    refused(adapter, WEIGHTS, key, *words)


def test_half_a_pair_and_nothing_at_all(adapter: Path) -> None:
    edit_weights(adapter, lambda tensors: tensors.pop(f"{PREFIX}.lora_B.weight"))
    refused(adapter, WEIGHTS, f"{PREFIX}.lora_A.weight", "no matching lora_B")
    edit_weights(adapter, lambda tensors: tensors.clear())
    refused(adapter, WEIGHTS, "no tensors")


def test_unknown_dtype(adapter: Path) -> None:
    edit_weights(adapter, lambda t: t.update({k: v.double() for k, v in t.items()}))
    refused(adapter, WEIGHTS, "F64", "BF16")


def test_missing_files(adapter: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", kind=AdapterLoadError)
    refused(adapter / CONFIG, "is a file", kind=AdapterLoadError)
    (adapter / WEIGHTS).unlink()
    refused(adapter, WEIGHTS, "adapter_model.bin")
    os.mkfifo(adapter / WEIGHTS)
    refused(adapter, WEIGHTS, "not a regular file", kind=AdapterLoadError)
    (adapter / CONFIG).unlink()
    refused(adapter, f"no {CONFIG}", "save_pretrained")
    with pytest.raises(AdapterLoadError):
        read(Path("null\0byte"))


@settings(
    deadline=None,
    derandomize=True,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.slow
def test_any_bytes_are_read_or_refused(adapter: Path, saved: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray((saved / file).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly in the header, where a byte matters more than in the weights.
        limit = data.draw(st.sampled_from([12, 400, len(content)]))
        at = data.draw(st.integers(0, min(limit, len(content)) - 1))
        content[at] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content)] * 4 + [len(content) // 2]))]
    for name in (CONFIG, WEIGHTS):
        shutil.copy(saved / name, adapter / name)
    (adapter / file).write_bytes(content)
    try:
        packed = read(adapter)
    except AdapterError:
        return
    if file == WEIGHTS:
        # What is accepted is also what the safetensors library reads.
        tensors = load_file(adapter / WEIGHTS)
        assert torch.equal(packed.tensors[0, "q_proj"][0], tensors[f"{PREFIX}.lora_A.weight"])
