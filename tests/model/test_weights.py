"""Reading checkpoints: layouts, dtypes, and everything that can be wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.plain_decoder import plain_decoder
from support.tiny_models import build_model

from aioengine.errors import ConfigError
from aioengine.model.files.folder import unreadable
from aioengine.model.files.hf_config import read_spec
from aioengine.model.files.weights import load_weights

Q0 = "model.layers.0.self_attn.q_proj.weight"


def load(model: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    decoder = plain_decoder(read_spec(model), dtype)
    load_weights(decoder, model)
    found = decoder.parameters()
    return {name: one for name, one in found.items() if isinstance(one, torch.Tensor)}


def edit(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_model(tmp_path / "model", "llama", num_hidden_layers=2)


def test_a_sharded_checkpoint_equals_a_single_one(tmp_path: Path) -> None:
    single = load(build_model(tmp_path / "single", "qwen2"))
    model = build_model(tmp_path / "sharded", "qwen2", max_shard_size="100KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    for name, tensor in load(model).items():
        assert torch.equal(tensor, single[name]), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_converted_to_the_compute_dtype(
    tmp_path: Path, stored: torch.dtype, computed: torch.dtype
) -> None:
    model = build_model(tmp_path, "llama", dtype=stored, num_hidden_layers=1)
    file = load_file(model / "model.safetensors")
    assert file[Q0].dtype == stored
    for name, tensor in load(model, computed).items():
        assert torch.equal(tensor, file[name].to(computed)), name


def test_rotary_buffers_and_the_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    model = build_model(tmp_path, "llama", tie_word_embeddings=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(model, change)
    assert "lm_head.weight" not in load(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q0), "1 of 21 parameters are missing: .*layers.0.self_attn.q_proj"),
        (lambda t: t.update({Q0: torch.ones(3, 4)}), r"q_proj.*\(64, 64\).*found \(3, 4\)"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "unexpected parameter model.extra"),
        (lambda t: t.update({Q0: torch.ones(64, 64).int()}), "q_proj.*floating.*int32"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    model: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    edit(model, change)
    with pytest.raises(ConfigError, match=message):
        load(model)


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), float("-inf"), 1e38]))
@pytest.mark.slow
def test_a_value_that_is_not_finite_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: float
) -> None:
    """Anywhere; 1e38 is a number in bfloat16 and float32, and none in float16."""
    model = build_model(tmp_path_factory.mktemp("model"), "qwen3", num_hidden_layers=1)
    tensors = load_file(model / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensors[name].view(-1)[data.draw(st.integers(0, tensors[name].numel() - 1))] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if value == 1e38 and dtype != torch.float16:
            load(model, dtype)
            continue
        with pytest.raises(ConfigError, match=rf"{re.escape(name)}: a value is not finite in \w+;"):
            load(model, dtype)


def test_a_sum_that_overflows_is_none_of_its_values(model: Path) -> None:
    edit(model, lambda tensors: tensors[Q0].fill_(60000.0))
    load(model, torch.float16)


def test_a_missing_or_broken_file_is_refused_by_name(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a readable"):
        load(model)
    # A file without permission looks to safetensors like one that does not exist.
    error = unreadable(path / "below", FileNotFoundError("No such file or directory"))
    assert str(error).endswith("model.safetensors/below: cannot be read: Not a directory")
    path.unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors: no such file"):
        load(model)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    model = build_model(tmp_path, "llama", max_shard_size="100KB")
    index_path = model / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())

    shard = next(iter(index["weight_map"].values()))
    wrong = {**index["weight_map"], "model.ghost": shard}
    index_path.write_text(json.dumps({"weight_map": wrong}))
    with pytest.raises(ConfigError, match=r"model\.ghost is missing"):
        load(model)

    index_path.write_text(json.dumps(index))
    (model / shard).unlink()
    with pytest.raises(ConfigError, match=f"{shard}: no such file"):
        load(model)

    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index_path.write_text(text)
        with pytest.raises(ConfigError, match="not a safetensors index"):
            load(model)


def test_the_same_parameter_in_two_shards_is_refused(tmp_path: Path) -> None:
    model = build_model(tmp_path, "llama", max_shard_size="100KB")
    first, second = sorted(model.glob("model-*.safetensors"))[:2]
    tensors = load_file(second)
    tensors.update(dict([next(iter(load_file(first).items()))]))
    save_file(tensors, second)
    with pytest.raises(ConfigError, match="stored twice"):
        load(model)
