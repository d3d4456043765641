"""Families that the native decoder runs beside Llama's, served: against transformers and peft in float32.

``tests/kernels/test_triton.py`` runs this file in Triton's interpreter, too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.any_models import build_any, config_of
from support.selection import mostly_slow
from support.served_models import check, engine_of

from aioengine.errors import ConfigError
from aioengine.model.files.resolve import read_spec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["cpu", "torch"]
SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}
"""That the compiled step covers."""
WINDOWS: dict[str, Any] = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {"embedding_multiplier": 3.0}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 9}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**WINDOWS, "query_pre_attn_scalar": 20}),
    "gemma3": ("gemma3_text", {}),
    "glm4": ("glm4", {}),
}
if INTERPRETED:  # which is slow; tests/kernels/test_layer_ops.py has the operations of the others
    CASES = {"gemma2": CASES["gemma2"]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", mostly_slow(CASES, "gemma2"))
async def test_a_family(case: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base rows, an adapter on some linears and one on all: mixed batches, swaps and shared prefixes."""
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    family, fields = CASES[case]
    model = build_any(tmp_path, family, **SIZES, **fields)
    async with engine_of(model.folder, model_impl="auto", block_size=16) as engine:
        assert engine.info.model_impl == "native"
        assert engine.info.batch_invariant == (backend == "cpu")
        await check(model, engine)


def test_an_adapter_is_on_the_matrix_that_the_family_has(tmp_path: Path) -> None:
    config_of("phi3").save_pretrained(tmp_path)
    spec = read_spec(tmp_path, "native")
    assert spec.targets(["down_proj", "qkv_proj"]) == ("qkv_proj", "down_proj")
    with pytest.raises(ConfigError, match=r"\['q_proj'\] cannot be targeted; allowed: qkv_proj, o_proj"):
        spec.targets(["q_proj"])
