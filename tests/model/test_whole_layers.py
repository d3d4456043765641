"""Layers that are computed in one call: recognised by what they compute, and equal to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.any_models import COMMON, MIXED, build_any
from support.selection import mostly_slow_rows
from support.served_models import check, engine_of
from torch import Tensor
from transformers.models import llama

from aioengine.kernels import get_backend
from aioengine.model.files.resolve import read_spec
from aioengine.model.generic.layers import LayerForward
from aioengine.model.generic.model import GenericModel
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import Quantization

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(get_backend("cpu").name != "cpu", reason="needs the CPU library"),
]
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}


def whole(
    folder: Path, dtype: torch.dtype = torch.float32, quantization: Quantization = "none"
) -> list[bool]:
    """Whether each layer is one call."""
    spec = read_spec(folder, "transformers")
    decoder = ModelRunner(
        *(spec, folder), dtype=dtype, device="cpu", num_blocks=20, block_size=16,
        max_loras=1, max_lora_rank=4, target_modules=spec.targets(None), max_model_len=64,
        quantization=quantization,
    ).decoder  # fmt: skip
    assert isinstance(decoder, GenericModel)
    forwards = [vars(module).get("forward") for module in decoder.modules.values()]
    return [forward.parts is not None for forward in forwards if isinstance(forward, LayerForward)]


@pytest.mark.parametrize(
    ("family", "fields"),
    mostly_slow_rows(
        [
            ("llama", {"attention_bias": True, "mlp_bias": True}),
            ("qwen3", {}),
            ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 2.0}),
            ("gemma3_text", MIXED),
            ("granite", {"attention_multiplier": 0.2, "residual_multiplier": 0.7}),
            ("olmo2", {}),
            ("exaone4", MIXED),
            ("smollm3", {"no_rope_layer_interval": 2}),
            ("phi3", {}),
            ("glm4", {"head_dim": 32}),
            ("seed_oss", {}),
            ("ernie4_5", {}),
        ],
        ("qwen3", {}),
        ("phi3", {}),
    ),
)
@pytest.mark.slow
async def test_families(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = build_any(tmp_path, family, **{**WIDE, **fields})
    assert whole(model.folder) == [True, True]
    assert whole(model.folder, torch.bfloat16) == [True, True]
    async with engine_of(model.folder, block_size=16) as engine:
        await check(model, engine)


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_quantized_linears(form: Quantization, tmp_path: Path) -> None:
    model = build_any(tmp_path, "llama", **WIDE)
    assert whole(model.folder, quantization=form) == [True, True]


class OtherConfig(transformers.LlamaConfig):
    model_type = "almost-a-usual-layer"
    way: str = ""


def plain(x: Tensor, of: Tensor) -> Tensor:
    return x + of


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as usual": plain,
    "twice": lambda x, of: 2 * x + of,
    "a bit less": lambda x, of: x + 0.97 * of,
    "cut off": lambda x, of: (x + of).clamp(-20, 20),
    "large ones cut off": lambda x, of: x + of.clamp(max=3.0),
    "the other way": lambda x, of: x - of,
    "without": lambda x, of: of,
}


class OtherLayer(llama.modeling_llama.LlamaDecoderLayer):
    """It adds otherwise behind its MLP."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.add = WAYS[config.way]

    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        hidden_states = hidden_states + attended
        return self.add(hidden_states, self.mlp(self.post_attention_layernorm(hidden_states)))


class OtherForCausalLM(transformers.LlamaForCausalLM):
    config_class = OtherConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for i in range(len(self.model.layers)):
            self.model.layers[i] = OtherLayer(config, i)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
async def test_layers_that_add_otherwise_keep_their_own_code(way: str, tmp_path: Path) -> None:
    auto: Any = transformers
    auto.AutoConfig.register(OtherConfig.model_type, OtherConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(OtherConfig, OtherForCausalLM, exist_ok=True)
    model = build_any(tmp_path, OtherConfig.model_type, **{**COMMON, **WIDE, "way": way})
    assert whole(model.folder) == [way == "as usual"] * 2
    async with engine_of(model.folder, block_size=16) as engine:
        await check(model, engine)


class BetweenConfig(transformers.LlamaConfig):
    model_type = "changes-what-layers-give"
    way: str = ""


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "anew": lambda x: 0.9 * x,
    "in place": lambda x: x.mul_(0.9),
    "a copy": lambda x: x.clone(),
}


class BetweenForCausalLM(transformers.LlamaForCausalLM):
    config_class = BetweenConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        change = BETWEEN[config.way]
        self.model.layers[0].register_forward_hook(lambda _module, _arguments, output: change(output))


@pytest.mark.parametrize("way", BETWEEN)
@pytest.mark.slow
async def test_a_layer_that_gets_something_else_than_the_one_before_has_given(
    way: str, tmp_path: Path
) -> None:
    """It is not computed ahead."""
    auto: Any = transformers
    auto.AutoConfig.register(BetweenConfig.model_type, BetweenConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(BetweenConfig, BetweenForCausalLM, exist_ok=True)
    fields = {**COMMON, **WIDE, "num_hidden_layers": 3, "way": way}
    model = build_any(tmp_path, BetweenConfig.model_type, **fields)
    async with engine_of(model.folder, block_size=16) as engine:
        await check(model, engine)


def test_layers_are_computed_ahead(tmp_path: Path) -> None:
    """Those of a kind that follow each other: here three with one rotation, and one with another."""
    layers = ["sliding_attention"] * 3 + ["full_attention"]
    fields = {**WIDE, "num_hidden_layers": 4, "sliding_window": 6, "layer_types": layers}
    folder = build_any(tmp_path, "gemma3_text", **fields).folder
    spec = read_spec(folder, "transformers")
    decoder = ModelRunner(
        *(spec, folder), dtype=torch.float32, device="cpu", num_blocks=20, block_size=16, max_model_len=64
    ).decoder
    assert isinstance(decoder, GenericModel)
    forwards = [vars(module).get("forward") for module in decoder.modules.values()]
    ahead = [forward.ahead for forward in forwards if isinstance(forward, LayerForward)]
    assert ahead == [2, 1, 0, 0]
