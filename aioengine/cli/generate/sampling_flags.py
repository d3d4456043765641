"""Flags for the fields of SamplingParams, and for those of a request."""

from __future__ import annotations

from dataclasses import dataclass

from cyclopts import Group, Parameter

from aioengine.cli.help import FOLDED
from aioengine.cli.struct_flags import StructFlags, flags_of
from aioengine.request import RequestOptions, SamplingParams

_SAMPLING = Group("Sampling", sort_key=5)
_MORE_SAMPLING = Group(f"{FOLDED} sampling flags", sort_key=20)
_REQUEST = Group(f"{FOLDED} request flags", sort_key=21)


@Parameter(name="*", group=_SAMPLING)
@dataclass(frozen=True, kw_only=True)
@flags_of(
    SamplingParams,
    group=_SAMPLING,
    more=_MORE_SAMPLING,
    shown=("max_tokens", "temperature", "top_p", "stop", "logprobs"),
    left_out=("logit_bias", "seed", "prompt_logprobs", "pooling", "constraint"),
)
class SamplingFlags(StructFlags):
    """Flags for sampling. Those that are not given have the defaults of SamplingParams."""


@Parameter(name="*", group=_REQUEST)
@dataclass(frozen=True, kw_only=True)
@flags_of(RequestOptions, group=_REQUEST, only=("priority", "deadline", "tenant"))
class RequestFlags(StructFlags):
    """Flags with the scheduling arguments of requests, for the policies that look at them."""
