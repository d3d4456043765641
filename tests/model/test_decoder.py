"""The decoder against transformers in float32, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build_model, reference_generate, reference_logits

from aioengine.step import Sampled, SequenceWork

MakeDriver = Callable[..., Any]

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5e4}
LONGROPE = [1.0, 1.1, 1.3, 1.7, 2.0, 3.0]

LLAMA3 = {"rope_theta": 5e3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BETAS = {"factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}


def scaled(kind: str, original: int | None = None, **fields: Any) -> dict[str, Any]:
    """Positions that are scaled, of a model that was trained on ``original`` of them."""
    known = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_parameters": {"rope_type": kind, **fields, **known}}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 4}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1, "head_dim": 8}),
    "llama-linear": ("llama", scaled("linear", factor=4.0)),
    "llama-llama3": ("llama", scaled("llama3", 64, **LLAMA3)),
    "llama-yarn": ("llama", scaled("yarn", 64, factor=8.0)),
    "llama-yarn-betas": ("llama", scaled("yarn", 32, **BETAS)),
    "mistral-sliding": ("mistral", {}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2-sliding": ("qwen2", {}),
    "qwen2-tied-full": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "granite": ("granite", {}),
    "granite-biases": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {}),
    "smollm3-no-rope": ("smollm3", {"no_rope_layers": [0, 0, 1], "attention_bias": True}),
    "olmo2": ("olmo2", {}),
    "olmo2-bias": ("olmo2", {"attention_bias": True}),
    "olmo2-one-kv-head": ("olmo2", {"num_key_value_heads": 1}),
    "olmo3": ("olmo3", {}),
    "olmo3-yarn": (
        "olmo3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}},
    ),
    "phi3": ("phi3", {}),
    "phi3-sliding": ("phi3", {"sliding_window": 12, "partial_rotary_factor": 1.0}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_scaling": {"type": "longrope", "short_factor": LONGROPE, "long_factor": [2.0] * 6},
        },
    ),
    "gemma": ("gemma", {}),
    "gemma-tied": ("gemma", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", {}),
    "gemma2-caps-off": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {}),
    "gemma3-linear": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
            "final_logit_softcapping": 20.0,
        },
    ),
    "glm4": ("glm4", {}),
}


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 256), k=length)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def get(variant: str) -> Path:
        family, overrides = VARIANTS[variant]
        path = root / variant
        return path if path.exists() else build_model(path, family, **overrides)

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_output_equals_transformers(
    variant: str, models: Callable[[str], Path], make_driver: MakeDriver
) -> None:
    model = models(variant)
    driver = make_driver(model)
    sequence = driver.add(prompt(1, 21))
    driver.run(sequence, new_tokens=28)
    expected = reference_generate(model, prompt(1, 21), 28)
    assert sequence.output == expected
    assert len(set(expected)) > 8, "degenerate model: the comparison would prove little"


@pytest.mark.parametrize("variant", ["llama", "mistral-sliding"])
def test_what_other_cells_of_the_cache_hold_does_not_matter(
    variant: str, models: Callable[[str], Path], make_driver: MakeDriver
) -> None:
    """NaN anywhere but in a sequence's own cells must not reach it, not even through a mask."""
    model = models(variant)
    driver = make_driver(model)
    cache = driver.runner.kv_cache
    for tensor in (*cache.k, *cache.v):
        tensor.fill_(float("nan"))
    sequences = [driver.add(prompt(s, n)) for s, n in ((9, 30), (10, 2))]
    driver.run(*sequences, new_tokens=8, chunk=7)
    assert sequences[0].output == reference_generate(model, prompt(9, 30), 8)
    assert sequences[1].output == reference_generate(model, prompt(10, 2), 8)


def test_only_rows_that_sample_are_projected(models: Callable[[str], Path], make_driver: MakeDriver) -> None:
    seen: list[tuple[int, ...]] = []

    def sample(logits: torch.Tensor, rows: list[SequenceWork]) -> list[Sampled]:
        seen.append(tuple(logits.shape))
        return [Sampled(int(t)) for t in logits.argmax(-1)]

    driver = make_driver(models("llama"), sample=sample)
    a, b = driver.add(prompt(1, 10)), driver.add(prompt(2, 10))
    driver.step((a, 4), (b, 4))
    assert seen == []
    driver.step((a, 6), (b, 2))
    assert seen == [(1, 256)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.04), (torch.float16, 0.006)])
def test_half_precision_logits_are_close(
    dtype: torch.dtype,
    tolerance: float,
    models: Callable[[str], Path],
    make_driver: MakeDriver,
) -> None:
    captured: list[torch.Tensor] = []

    def sample(logits: torch.Tensor, rows: list[SequenceWork]) -> list[Sampled]:
        captured.append(logits)
        return [Sampled(0) for _ in rows]

    for variant in ("llama", "qwen3", "granite", "olmo2", "gemma2", "gemma3"):
        model = models(variant)
        driver = make_driver(model, dtype=dtype, sample=sample)
        driver.run(driver.add(prompt(3, 30)), new_tokens=1)
        logits = captured.pop()[0]
        assert logits.dtype == dtype
        expected = reference_logits(model, prompt(3, 30))[-1]
        error = (logits.float() - expected).norm() / expected.norm()
        assert error < tolerance
