"""Tiny quantized checkpoints, each beside the same model with its weights expanded, for transformers.

Codes and their layouts are made here from what the formats say, apart from the package's own readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import build_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Pair(NamedTuple):
    """A quantized checkpoint, and what it stands for in float32."""

    packed: Path
    expanded: Path


class Quantized(NamedTuple):
    """One linear, quantized."""

    tensors: dict[str, torch.Tensor]
    """By the last parts of their names."""
    weight: torch.Tensor
    """[n, k] float32: what they stand for."""


Quantize = Callable[[torch.Tensor, torch.Generator], Quantized]


def write_quantized(
    root: Path,
    quantize: Quantize,
    config: Mapping[str, Any],
    *,
    skip: str = "lm_head",
    family: str = "llama",
    **overrides: Any,
) -> Pair:
    """A tiny model whose linears are quantized, but for names with ``skip`` in them."""
    expanded = build_model(root / "expanded", family, **overrides)
    wanted = lambda name: name.endswith("proj.weight") and skip not in name  # noqa: E731
    return quantize_model(expanded, root / "packed", quantize, config, wanted)


def quantize_model(
    expanded: Path, packed: Path, quantize: Quantize, config: Mapping[str, Any], wanted: Callable[[str], bool]
) -> Pair:
    """Write the model ``expanded`` with the ``wanted`` weights quantized to ``packed``. The former gets the
    values that these have then."""
    generator = torch.Generator().manual_seed(5)
    plain, stored = load_file(expanded / "model.safetensors"), {}
    for name, weight in plain.items():
        if not wanted(name):
            stored[name] = weight
            continue
        made = quantize(weight, generator)
        plain[name] = made.weight
        for kind, tensor in made.tensors.items():
            stored[f"{name.removesuffix('.weight')}.{kind}"] = tensor.contiguous()
    save_file(plain, expanded / "model.safetensors", metadata={"format": "pt"})
    packed.mkdir()
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((expanded / "config.json").read_text())
    settings["quantization_config"] = dict(config)
    (packed / "config.json").write_text(json.dumps(settings))
    return Pair(packed, expanded)


class Codes(NamedTuple):
    q: torch.Tensor
    """[n, k] whole numbers from 0 on"""
    scale: torch.Tensor
    """[n, groups] float16"""
    zero: torch.Tensor
    """[n, groups]"""
    group_of: torch.Tensor
    """[k]"""

    @property
    def weight(self) -> torch.Tensor:
        at = self.group_of.long()
        return (self.q - self.zero[:, at]).float() * self.scale.float()[:, at]


def codes(
    weight: torch.Tensor, generator: torch.Generator, bits: int, group: int, *, symmetric: bool, ordered: bool
) -> Codes:
    """The nearest codes in groups of inputs, which need not be neighbours if they are ``ordered``."""
    n, k = weight.shape
    order = torch.randperm(k, generator=generator) if ordered else torch.arange(k)
    group_of = torch.empty(k, dtype=torch.int32)
    group_of[order] = torch.arange(k, dtype=torch.int32) // group
    sorted_groups = weight[:, order].view(n, -1, group)
    top, low = sorted_groups.amax(-1), sorted_groups.amin(-1)
    most = 2**bits - 1
    if symmetric:
        scale = (sorted_groups.abs().amax(-1) / (most // 2)).half()
        zero = torch.full_like(scale, 2 ** (bits - 1)).int()
    else:
        scale = ((top - low) / most).half()
        zero = (-low / scale.float()).round().clamp(1, most).int()
    at = group_of.long()
    q = ((weight / scale.float()[:, at]).round().int() + zero[:, at]).clamp(0, most)
    return Codes(q, scale, zero, group_of)


def words(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes along the last dimension in int32, the lowest first: [..., m] -> [..., m * bits / 32]."""
    each = 32 // bits
    parts = values.long().view(*values.shape[:-1], -1, each)
    word = sum(parts[..., code] << (bits * place) for place, code in enumerate(order or range(each)))
    assert isinstance(word, torch.Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).int()


def gptq(
    bits: int = 4, group: int = 32, *, symmetric: bool = False, ordered: bool = False, less: int = 1
) -> Quantize:
    """``less`` is what the format's version takes from zero points."""

    def quantize(weight: torch.Tensor, generator: torch.Generator) -> Quantized:
        size = weight.shape[1] if group == -1 else group
        made = codes(weight, generator, bits, size, symmetric=symmetric, ordered=ordered)
        tensors = {
            "qweight": words(made.q, bits).T,
            "qzeros": words((made.zero - less).T, bits),
            "scales": made.scale.T,
            "g_idx": made.group_of,
        }
        return Quantized(tensors, made.weight)

    return quantize


def awq(group: int = 32) -> Quantize:
    def quantize(weight: torch.Tensor, generator: torch.Generator) -> Quantized:
        made = codes(weight, generator, 4, group, symmetric=False, ordered=False)
        tensors = {
            "qweight": words(made.q.T.contiguous(), 4, AWQ_ORDER),
            "qzeros": words(made.zero.T.contiguous(), 4, AWQ_ORDER),
            "scales": made.scale.T,
        }
        return Quantized(tensors, made.weight)

    return quantize


def pack_quantized(bits: int = 4, group: int = 32, *, symmetric: bool = True) -> Quantize:
    """Of compressed-tensors."""

    def quantize(weight: torch.Tensor, generator: torch.Generator) -> Quantized:
        size = weight.shape[1] if group == -1 else group
        made = codes(weight, generator, bits, size, symmetric=symmetric, ordered=False)
        tensors = {
            "weight_packed": words(made.q, bits),
            "weight_scale": made.scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(made.zero.T.contiguous(), bits).T
        return Quantized(tensors, made.weight)

    return quantize


def compressed(format: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A ``quantization_config`` of compressed-tensors."""
    group = {"weights": {"type": "int", "symmetric": True, **weights}, "targets": ["Linear"], **more}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*gate$"],
        "quantization_status": "compressed",
    }


def int_quantized(weight: torch.Tensor, generator: torch.Generator) -> Quantized:
    """Of compressed-tensors: a scale for each output."""
    made = codes(weight, generator, 8, weight.shape[1], symmetric=True, ordered=False)
    return Quantized({"weight": (made.q - 128).char(), "weight_scale": made.scale}, made.weight)


def float8(
    block: tuple[int, int] | None = None, *, name: str = "weight_scale", whole: bool = False
) -> Quantize:
    """A scale for each output, for the ``whole`` weight, or for blocks of both sides."""

    def quantize(weight: torch.Tensor, generator: torch.Generator) -> Quantized:
        del generator
        n, k = weight.shape
        rows, columns = block or ((n, k) if whole else (1, k))
        tall, wide = -(-n // rows), -(-k // columns)
        padded = torch.zeros(tall * rows, wide * columns)
        padded[:n, :k] = weight
        scale = padded.view(tall, rows, wide, columns).abs().amax((1, 3)) / 448
        whole_scale = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        q = (weight / whole_scale).to(torch.float8_e4m3fn)
        stored = scale.view(()) if whole else scale
        return Quantized(
            {"weight": q, name: stored, "input_scale": torch.tensor(1.0)}, q.float() * whole_scale
        )

    return quantize
