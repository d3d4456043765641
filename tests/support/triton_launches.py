"""What the Triton backend launches for a layer, taken down in place of being launched, and compiled for a GPU
that need not be here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from support.layer_cases import Layer, LayerCase
from support.lora_cases import make_case
from support.random_blocks import random_codes
from support.triton_targets import Gpu, Usage, usage_of
from torch import Tensor
from triton.compiler import ASTSource

from aioengine.kernels import Backend, ExpertPlan, Norm
from aioengine.kernels.blocks import StackedWeight
from aioengine.kernels.triton import attention
from aioengine.kernels.triton import backend as triton_backend
from aioengine.kernels.triton.launch import Grid, Launcher
from aioengine.kernels.weight import PlainWeight

BACKEND: Backend = triton_backend
_NAMES = {"float": "fp", "bfloat": "bf", "int": "i", "uint": "u"}


def _type(value: Tensor | float) -> str:
    """Return Triton's name of an argument's type."""
    if isinstance(value, Tensor):
        found = re.fullmatch(r"torch\.([a-z]+)(\d+)", str(value.dtype))
        assert found is not None, value.dtype
        return f"*{_NAMES[found[1]]}{found[2]}"
    return "fp32" if isinstance(value, float) else "i32"


class Launch(NamedTuple):
    """A kernel as Triton would specialise it for some arguments."""

    kernel: Any
    types: tuple[str, ...]
    aligned: tuple[int, ...]
    """The arguments that are multiples of 16."""
    constants: tuple[tuple[str, int], ...]
    """With the number of warps and of stages."""

    @classmethod
    def of(cls, launcher: Launcher, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> Launch:
        types = map(_type, (*tensors, *numbers))
        places = [*(tensor.data_ptr() for tensor in tensors), *numbers]
        aligned = [i for i, place in enumerate(places) if isinstance(place, int) and place % 16 == 0]
        return cls(launcher.kernel, tuple(types), tuple(aligned), tuple(launcher.options.items()))

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).removesuffix("_kernel")

    def compiled(self, gpu: Gpu) -> Usage:
        """Raises what triton does if it does not compile, and RuntimeError if ptxas fails."""
        constants = {key: value for key, value in self.constants if key in self.kernel.arg_names}
        names = self.kernel.arg_names
        signature = {name: "constexpr" if name in constants else None for name in names}
        signature |= dict(zip(names, self.types, strict=False))
        attributes = {(i,): [["tt.divisibility", 16]] for i in self.aligned}
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
        own = dict(self.constants)
        return usage_of(source, gpu.target, own.get("num_warps", 4), own.get("num_stages", 3))


def launched(work: Callable[[], object], gpu: Gpu) -> list[Launch]:
    """Return what ``work`` launches on such a GPU; the results of its kernels are not there."""
    found: dict[Launch, None] = {}

    def take_down(launcher: Launcher, _: Grid, tensors: Any, numbers: Any) -> None:
        found[Launch.of(launcher, tensors, numbers)] = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launcher, "__call__", take_down)
        patch.setattr(attention, "limits", lambda device: gpu.limits)
        patch.setattr(attention, "capability", lambda device: gpu.capability)
        work()
    return list(found)


def of_lora(dtype: torch.dtype, rank: int, tokens: int, *, int8: bool = False, width: int = 4096) -> None:
    """A linear's adapters, and an embedding's."""
    sizes = {"n_in": width, "widths": [width], "targeted": [0], "dtype": dtype}
    case = make_case([(0, tokens)], [rank], rank, slot_affine=[True], **sizes)
    batch, pool = case.batch, case.int8_pool if int8 else case.pool
    BACKEND.lora_expand(BACKEND.lora_shrink(case.x, pool, batch), pool, case.y, batch)
    BACKEND.lora_affine(case.y, pool, batch)
    BACKEND.lora_embed(torch.zeros(tokens, dtype=torch.int64), pool, batch)


def of_attention(
    dtype: torch.dtype, head_dim: int, group: int, *, float8: bool = False, **fields: Any
) -> None:
    """Attention and RoPE of decoding in short contexts and long ones, and of prompts."""
    for spans in ([(20, 1)] * 300, [(9000, 1)], [(0, 400)]):
        sizes = {"heads": 2 * group, "kv_heads": 2, "head_dim": head_dim, "dtype": dtype}
        layer = Layer(LayerCase(spans, **sizes, **fields))
        if float8:
            layer.cache = layer.cache._make(tensor.to(torch.uint8) for tensor in layer.cache)
        layer.step(BACKEND, spans)


def of_elementwise(dtype: torch.dtype, size: int) -> None:
    """Norms and activations."""
    x = torch.zeros(2, size, dtype=dtype)
    for delta in (None, x):
        BACKEND.add_rms_norm(x, delta, Norm(x[0], 1e-5))
    for activate in (BACKEND.silu_and_mul, BACKEND.gelu_and_mul):
        activate(x)
    BACKEND.clamped_swiglu(x, alpha=1.7, limit=7.0)


def of_experts(dtype: torch.dtype, tokens: int, *, format: str = "") -> None:
    """The linears of 16 experts, as they are or in blocks."""
    plan = ExpertPlan(torch.arange(tokens)[:, None] % 16, 16)
    if format:
        weight: Any = StackedWeight([weight_of(format, 256, 128, dtype)] * 16)
    else:
        weight = PlainWeight(torch.zeros(16 * 256, 128, dtype=dtype))
    for bias in (None, torch.zeros(16 * 256, dtype=dtype)):
        BACKEND.expert_linear(torch.zeros(tokens, 128, dtype=dtype), weight, bias, plan)


def of_blocks(dtype: torch.dtype, format: str, tokens: int, group: int, n: int, **kind: bool) -> None:
    """A product with a quantized weight."""
    weight = weight_of(format, n, 256, dtype, group=group, **kind)
    BACKEND.linear(torch.zeros(tokens, 256, dtype=dtype), weight, None)


def weight_of(format: str, n: int, k: int, dtype: torch.dtype, *, group: int = 32, **kind: bool) -> Any:
    return random_codes(format, n, k, 0, group=group, dtype=dtype, **kind)


def everything(*, few: bool) -> Iterator[tuple[Callable[..., None], Mapping[str, Any]]]:
    """List works for models of many shapes, or a sample: functions, and what else they are given."""
    for rank in (16, 512) if few else (1, 16, 32, 64, 128, 256, 320, 512):
        for tokens in (1, 40):
            for width in (4096,) if few else (512, 1024, 4096, 16384):
                yield of_lora, {"rank": rank, "tokens": tokens, "width": width}
    yield of_lora, {"rank": 16, "tokens": 1, "int8": True}
    for head_dim in (128,) if few else (64, 80, 96, 128, 256):
        for group in (4,) if few else (1, 3, 4, 7, 8):
            for float8 in (False, True):
                yield of_attention, {"head_dim": head_dim, "group": group, "float8": float8}
    yield of_attention, {"head_dim": 64, "group": 3, "sinks": True, "norms": True}
    for head_dim, cap in ((64, None), (128, None), (256, 50.0)):
        if not few:
            yield of_attention, {"head_dim": head_dim, "group": 4, "window": 100, "soft_cap": cap}
    for size in (4096,) if few else (512, 2048, 4096, 16384):
        yield of_elementwise, {"size": size}
    for tokens in (16, 1600):
        for format in ("", "mxfp4") if few else ("", "mxfp4", "int4"):
            yield of_experts, {"tokens": tokens, "format": format}
    for format in ("int4", "mxfp4") if few else ("int4", "int8", "fp8", "mxfp4"):
        for tokens in (1, 40):
            for n, group in ((4096, 32), (4096, 128), (28672, 128)):
                if group == 32 or not (few or format == "mxfp4"):
                    yield of_blocks, {"format": format, "tokens": tokens, "n": n, "group": group}
    for kind in ({"zeros": True}, {"zeros": True, "ordered": True}):
        yield of_blocks, {"format": "int4", "tokens": 40, "n": 4096, "group": 128, **kind}
