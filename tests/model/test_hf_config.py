"""``config.json`` -> ModelSpec: both layouts of RoPE, defaults, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models

from aioengine.errors import ConfigError
from aioengine.model.files.hf.families import FAMILIES
from aioengine.model.files.hf_config import read_spec
from aioengine.model.spec import SUPPORTED_ARCHITECTURES, RopeSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}


def spec_of(folder: Path, config: dict[str, Any], **changes: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(config | changes))
    return read_spec(folder)


def test_the_plain_fields(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LLAMA, rope_theta=5e5, tie_word_embeddings=True)
    assert (spec.family, spec.vocab_size, spec.hidden_size) == ("llama", 1000, 64)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 4, 2, 16)
    assert (spec.intermediate_size, spec.rms_norm_eps, spec.max_position) == (128, 1e-5, 4096)
    assert spec.rope == RopeSpec(theta=5e5)
    assert spec.tie_embeddings
    assert spec.dtype == "bfloat16"
    assert not (spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.qk_norm)
    assert spec.sliding_windows == ()


def test_the_architecture_may_be_given_by_model_type_alone(tmp_path: Path) -> None:
    config = {k: v for k, v in QWEN2.items() if k != "architectures"}
    assert spec_of(tmp_path, config).family == "qwen2"


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
YARN: dict[str, Any] = {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0}
YARN |= {"attention_factor": 1.5, "truncate": False}
SCALINGS: list[tuple[dict[str, Any], RopeSpec]] = [
    ({"rope_type": "linear", "factor": 2}, RopeSpec(type="linear", theta=5e5, factor=2.0)),
    (
        {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
        RopeSpec(type="llama3", theta=5e5, factor=8.0, original_max_position=1024),
    ),
    ({"rope_type": "yarn", **YARN}, RopeSpec(type="yarn", theta=5e5, original_max_position=4096, **YARN)),
]


@pytest.mark.parametrize(("scaling", "expected"), SCALINGS)
def test_rope_in_the_new_and_the_old_layout(
    tmp_path: Path, scaling: dict[str, Any], expected: RopeSpec
) -> None:
    new = spec_of(tmp_path, LLAMA, rope_parameters={"rope_theta": 5e5, **scaling})
    assert new.rope == expected
    assert spec_of(tmp_path, LLAMA, rope_theta=5e5, rope_scaling=scaling).rope == expected
    older = {("type" if k == "rope_type" else k): v for k, v in scaling.items()}
    assert spec_of(tmp_path, LLAMA, rope_theta=5e5, rope_scaling=older).rope == expected


def test_rope_defaults(tmp_path: Path) -> None:
    assert spec_of(tmp_path, LLAMA).rope == RopeSpec(theta=10000.0)
    assert spec_of(tmp_path, LLAMA, rope_scaling=None, rope_theta=1e6).rope == RopeSpec(theta=1e6)
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    assert spec_of(tmp_path, LLAMA, rope_scaling=yarn).rope.factor == 4.0


@pytest.mark.parametrize(
    ("config", "changes", "windows"),
    [
        (LLAMA, {"sliding_window": 8}, ()),
        (MISTRAL, {}, (4096,) * 4),
        (MISTRAL, {"sliding_window": None}, ()),
        (MISTRAL, {"sliding_window": 8}, (8,) * 4),
        (QWEN2, {"sliding_window": 8}, ()),
        (
            QWEN2,
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            QWEN3,
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_sliding_windows(
    tmp_path: Path, config: dict[str, Any], changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert spec_of(tmp_path, config, **changes).sliding_windows == windows


def test_end_of_sequence_ids_come_from_both_files(tmp_path: Path) -> None:
    assert spec_of(tmp_path, LLAMA).eos_token_ids == (2,)
    assert spec_of(tmp_path, LLAMA, eos_token_id=7).eos_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 7, 8]}')
    spec = spec_of(tmp_path, LLAMA, eos_token_id=7, bos_token_id=5)
    assert spec.eos_token_ids == (7, 9, 8)
    assert spec.bos_token_id == 5
    assert spec_of(tmp_path, LLAMA).eos_token_ids == (9, 7, 8)


@pytest.mark.parametrize("family", tiny_models.FAMILY)
def test_a_folder_saved_by_transformers(tmp_path: Path, family: str) -> None:
    """What transformers saved describes just the parameters that it saved."""
    from safetensors.torch import load_file

    spec = read_spec(tiny_models.build_model(tmp_path, family))
    stored = load_file(tmp_path / "model.safetensors")
    assert spec.num_parameters() == sum(t.numel() for t in stored.values())
    assert spec.dtype == "float32"
    assert spec.eos_token_ids == (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["CohereForCausalLM"]}, "CohereForCausalLM.*LlamaForCausalLM, Mistral"),
        ({"architectures": None, "model_type": "mamba"}, "mamba.*Qwen3ForCausalLM"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -5}, "vocab_size=-5"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers=2\.5.*integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*divide"),
        ({"head_dim": 15}, "head_dim=15.*even"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'.*bfloat16, float16, float32"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type='dynamic'.*llama3, yarn"),
        ({"rope_scaling": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0}}, "without mscale"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.*one flat"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        spec_of(tmp_path, LLAMA, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu'.*gelu_pytorch_tanh"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention.*causal"),
        ("Gemma3", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.*sliding_attention"),
        ("Gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ("Qwen3Moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: only \[\] is supported"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\].*4 layers"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers.*0 or 1"),
        ("Phi3", {"partial_rotary_factor": 1.5}, r"partial_rotary_factor=1\.5"),
        ("Phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor.*8 numbers"),
    ],
)
def test_what_other_families_refuse(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        spec_of(tmp_path, {**LLAMA, "head_dim": 16, "architectures": [f"{family}ForCausalLM"]}, **changes)


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (["full_attention"], "must list 4 layers"),
        (["chunked_attention"] * 4, "chunked_attention"),
        (["sliding_attention"] * 4, "needs sliding_window"),
    ],
)
def test_layer_types_that_cannot_be_right(tmp_path: Path, layer_types: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(tmp_path, QWEN2, layer_types=layer_types)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"{", "not valid JSON"), (b"[1]", "object"), (b"\xff\xfe", "not valid")],
)
def test_a_missing_or_malformed_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        read_spec(tmp_path)


def test_reading_a_spec_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, aioengine.model.files.hf_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_family_has_its_rows() -> None:
    assert FAMILIES.keys() == {*SUPPORTED_ARCHITECTURES.values()}
