"""Rotary position embedding, RoFormer (Su et al., 2021), https://arxiv.org/abs/2104.09864, and scalings.

The kernels decide which dimensions are a pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aioengine.model.spec import ModelSpec, RopeSpec


class Ropes:
    """The R rotations of a model (:attr:`ModelSpec.ropes`): frequencies, and factors on cos and sin."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        dim = spec.rotary_dim or spec.head_dim
        frequencies = [inverse_frequencies(rope, dim) for rope in spec.ropes]
        self._frequencies = torch.stack(frequencies)[:, None, None].to(device)
        scaling = torch.tensor([attention_scaling(rope) for rope in spec.ropes])
        self._scaling = scaling.view(-1, 1, 1, 1).to(device)
        self._scales = bool((scaling != 1.0).any())

    @property
    def half(self) -> int:
        """Pairs of dimensions that are rotated."""
        return self._frequencies.shape[-1]

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin for ``positions`` [T], each [R, T, 1, half] in float32.

        Computed once a step for all layers; a table up to the maximum position would take memory
        that the plan does not know of.
        """
        angles = positions.to(torch.float32)[:, None, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos.mul_(self._scaling), sin.mul_(self._scaling)) if self._scales else (cos, sin)


def inverse_frequencies(spec: RopeSpec, dim: int) -> Tensor:
    """Return the rotation per position of each pair of ``dim`` dimensions, in radians: [dim / 2], float32."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if spec.type == "none":
        return torch.zeros_like(exponent)
    if spec.type == "longrope":  # Ding et al., 2024, arXiv:2402.13753
        return 1.0 / (torch.tensor(spec.divisors, dtype=torch.float32) * spec.theta**exponent)
    inv_freq = 1.0 / (spec.theta**exponent)
    if spec.type == "linear":  # position interpolation, Chen et al., 2023, arXiv:2306.15595
        return inv_freq / spec.factor
    if spec.type == "llama3":
        return _llama3(spec, inv_freq)
    if spec.type == "yarn":
        return _yarn(spec, inv_freq, dim)
    return inv_freq


def attention_scaling(spec: RopeSpec) -> float:
    """Return the factor on cos and sin: 1, but for YaRN its attention temperature (section 3.4), and
    LongRoPE's."""
    if spec.type not in ("yarn", "longrope"):
        return 1.0
    if spec.attention_factor is not None:
        return spec.attention_factor
    return 1.0 if spec.factor <= 1 else 0.1 * math.log(spec.factor) + 1.0


def _llama3(spec: RopeSpec, inv_freq: Tensor) -> Tensor:
    """Llama 3.1's scaling by wavelength: long waves interpolated, short ones kept, a ramp between.

    Source: Grattafiori et al., 2024, arXiv:2407.21783, and Meta's reference implementation.
    """
    turns = spec.original_max_position * inv_freq / (2 * math.pi)  # context / wavelength
    ramp = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    keep = ramp.clamp(0.0, 1.0)
    return (1 - keep) * inv_freq / spec.factor + keep * inv_freq


def _yarn(spec: RopeSpec, inv_freq: Tensor, dim: int) -> Tensor:
    """YaRN, "NTK-by-parts" (Peng et al., 2023), https://arxiv.org/abs/2309.00071, section 3.2.

    Dimensions that turn more than ``beta_fast`` times within the original context are kept, those
    that turn less than ``beta_slow`` times are interpolated, with a linear ramp between.
    """

    def dimension(turns: float) -> float:
        """Return the (fractional) pair that makes this many turns within the original context."""
        wavelength = spec.original_max_position / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001  # avoids a division by zero
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / width
    interpolate = ramp.clamp(0.0, 1.0)
    return inv_freq / spec.factor * interpolate + inv_freq * (1 - interpolate)
