"""What replaces transformers' own arithmetic: recognised by what it computes, and equal to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_models import COMMON, build_any
from support.served_models import check, engine_of
from torch import Tensor
from torch.nn import functional as F
from transformers.models import cohere, deepseek_v3, glm4, gptj, llama

from aioengine.kernels import get_backend
from aioengine.model.files.resolve import read_spec
from aioengine.model.generic.model import GenericModel, Way
from aioengine.model.generic.recognised import Recognised
from aioengine.model.generic.rotation import pairing_of
from aioengine.model.generic.step import Holder
from aioengine.model.runner import ModelRunner

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(get_backend("cpu").name != "cpu", reason="needs the CPU library"),
]
FASTEST = Way(True, True, True, True, True)
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}
"""Sizes that the CPU library takes."""


class Norm(torch.nn.Module):
    """A norm that is named and written like no other."""

    def __init__(self, size: int, epsilon: float, formula: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.randn(size))
        self.tiny = epsilon
        self._formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self._formula(x, self.gain, self.tiny)


def normed(x: Tensor, epsilon: float) -> Tensor:
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)


NORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "rounded": lambda x, w, e: w * normed(x, e).to(x.dtype),
    "not rounded": lambda x, w, e: (w.float() * normed(x, e)).to(x.dtype),
    "offset": lambda x, w, e: ((1 + w.float()) * normed(x, e)).to(x.dtype),
    "by torch": lambda x, w, e: F.rms_norm(x.float(), w.shape, w.float(), e).to(x.dtype),
}
OTHERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "centred": lambda x, w, e: w * normed(x - x.mean(-1, keepdim=True), e).to(x.dtype),
    "the sum": lambda x, w, e: w * F.normalize(x.float(), dim=-1, eps=e).to(x.dtype),
    "clamped": lambda x, w, e: w * normed(x, e).clamp(-1, 1).to(x.dtype),
    "cuts off": lambda x, w, e: w * normed(x.clamp(-100, 100), e).to(x.dtype),
    "half an offset": lambda x, w, e: ((0.5 + w.float()) * normed(x, e)).to(x.dtype),
    "over rows": lambda x, w, e: w * normed(x.transpose(-1, -2), e).transpose(-1, -2).to(x.dtype),
    "gain": lambda x, w, e: x * w,
}


def recognised(module: Any) -> bool:
    Recognised({"it": module}, {}, Holder(None, ()), get_backend("cpu"))
    return "forward" in vars(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([*NORMS, *OTHERS]),
    size=st.integers(3, 70),
    epsilon=st.sampled_from([1e-5, 1e-6, 3e-6, 1e-2]),
    seed=st.integers(0, 99),
)
def test_norms(dtype: torch.dtype, name: str, size: int, epsilon: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = Norm(size, epsilon, {**NORMS, **OTHERS}[name]).to(dtype)
    module.gain.data = torch.randn(size, generator=generator).to(dtype)
    plain = copy.deepcopy(module)
    assert recognised(module) == (name in NORMS)
    scale = 10.0 ** torch.randint(-4, 3, (5, 1, 1), generator=generator)
    x = (scale * torch.randn(5, size, 4, generator=generator)).to(dtype).transpose(1, 2)
    with torch.inference_mode():
        torch.testing.assert_close(module(x), plain(x))
        torch.testing.assert_close(module(x.double()), plain(x.double()))  # not its own dtype


def test_a_norm_that_cuts_off_what_only_outliers_reach() -> None:
    clamped = Norm(64, 1e-5, lambda x, w, e: w * normed(x, e).clamp(-5, 5))
    assert recognised(Norm(64, 1e-5, NORMS["rounded"])) and not recognised(clamped)


def test_formulas_of_gelu() -> None:
    """Only what is as GELU by its tanh becomes one operation."""
    x = torch.linspace(-20, 20, 4001)
    names = {name for name in transformers.activations.ACT2FN if name not in ("xielu", "prelu")}
    found = set()
    for name in names:
        module = transformers.activations.ACT2FN[name]
        expected = module(x)
        if recognised(module):
            found.add(name)
        torch.testing.assert_close(module(x), expected, msg=name)
    assert {"gelu_new", "gelu_fast"} <= found
    assert not found & {"gelu", "quick_gelu", "silu", "relu", "relu2", "mish", "tanh"}


def test_rotations() -> None:
    rotation = apply_rotary_pos_emb
    assert pairing_of(rotation) == (False, False, False)
    assert pairing_of(cohere.modeling_cohere.apply_rotary_pos_emb) == (True, True, False)
    assert pairing_of(glm4.modeling_glm4.apply_rotary_pos_emb) == (True, False, True)
    assert pairing_of(gptj.modeling_gptj.apply_rotary_pos_emb) is None
    assert pairing_of(deepseek_v3.modeling_deepseek_v3.apply_rotary_pos_emb_interleave) is None
    # The other way round, of queries alone, and by something else.
    assert pairing_of(lambda q, k, cos, sin: rotation(q, k, cos, -sin)) is None
    assert pairing_of(lambda q, k, cos, sin: (rotation(q, k, cos, sin)[0], k)) is None
    assert pairing_of(lambda q, k, cos, sin: rotation(q, k, cos * 2, sin)) is None
    assert pairing_of(lambda q, k, cos, sin: q) is None


def runner_of(folder: Path, dtype: torch.dtype = torch.float32) -> ModelRunner:
    spec = read_spec(folder, "transformers")
    return ModelRunner(
        *(spec, folder), dtype=dtype, device="cpu", num_blocks=20, block_size=16,
        max_loras=1, max_lora_rank=4, target_modules=spec.targets(None), max_model_len=64,
    )  # fmt: skip


def way_of(folder: Path, dtype: torch.dtype = torch.float32) -> Way:
    decoder = runner_of(folder, dtype).decoder
    assert isinstance(decoder, GenericModel)
    return decoder.way


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("phi3", {}),
        ("gemma3_text", {}),
        ("cohere", {}),
        ("glm4", {"head_dim": 32}),
        ("gpt2", {"n_embd": 64}),
        ("gpt_neox", {}),
        ("starcoder2", {}),
        ("gpt_oss", {}),
        ("olmo2", {}),
    ],
)
@pytest.mark.slow
async def test_families_whose_sizes_the_library_takes(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = build_any(tmp_path, family, **{**WIDE, **fields})
    async with engine_of(model.folder, block_size=16) as engine:
        await check(model, engine)
    for dtype in (torch.float32, torch.bfloat16):
        assert way_of(model.folder, dtype) == FASTEST


apply_rotary_pos_emb = llama.modeling_llama.apply_rotary_pos_emb


class LateConfig(transformers.LlamaConfig):
    model_type = "scales-what-it-has-rotated"


class LateAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    """It scales queries behind the rotation."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, cache: Any = None, **more: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            linear(hidden_states).view(shape).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        q = 1.5 * q
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.modeling_llama.eager_attention_forward
        )
        out, weights = attend(self, q, k, v, scaling=self.scaling, **more)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class LateForCausalLM(transformers.LlamaForCausalLM):
    config_class = LateConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn = LateAttention(config, layer.self_attn.layer_idx)


async def test_a_model_that_does_more_after_its_rotation(tmp_path: Path) -> None:
    auto: Any = transformers
    auto.AutoConfig.register(LateConfig.model_type, LateConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(LateConfig, LateForCausalLM, exist_ok=True)
    model = build_any(tmp_path, LateConfig.model_type, **{**COMMON, **WIDE})
    async with engine_of(model.folder, block_size=16) as engine:
        await check(model, engine)
    assert way_of(model.folder) == FASTEST._replace(put_off=False, whole=False)


class ClampedConfig(transformers.LlamaConfig):
    model_type = "cuts-off-large-gates"


class ClampedMLP(llama.modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))


class ScaledMLP(llama.modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(0.97 * self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ClampedForCausalLM(transformers.LlamaForCausalLM):
    config_class = ClampedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = (ClampedMLP, ScaledMLP)[layer.self_attn.layer_idx % 2](config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_mlps_that_cut_off_or_scale_keep_their_own_code(dtype: torch.dtype, tmp_path: Path) -> None:
    auto: Any = transformers
    auto.AutoConfig.register(ClampedConfig.model_type, ClampedConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(ClampedConfig, ClampedForCausalLM, exist_ok=True)
    model = build_any(tmp_path, ClampedConfig.model_type, **{**COMMON, **WIDE})
    plain = build_any(tmp_path / "plain", "llama", **WIDE)
    for folder, changed in ((model.folder, False), (plain.folder, True)):
        decoder = runner_of(folder, dtype).decoder
        assert isinstance(decoder, GenericModel)
        mlps = [module for name, module in decoder.modules.items() if name.endswith(".mlp")]
        assert mlps and all(("forward" in vars(mlp)) == changed for mlp in mlps)
