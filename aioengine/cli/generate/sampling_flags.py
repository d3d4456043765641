"""Flags for the fields of SamplingParams, and for those of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Group, Parameter

from aioengine.cli.help import FOLDED

_SAMPLING = Group("Sampling", sort_key=5)
_MORE_SAMPLING = Group(f"{FOLDED} sampling flags", sort_key=20)
_MORE_REQUEST = Group(f"{FOLDED} request flags", sort_key=21)


@Parameter(name="*", group=_SAMPLING)
@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """Flags for sampling. Those that are not given have the defaults of SamplingParams."""

    max_tokens: int | None = None
    """Maximum tokens to generate (256)."""
    temperature: float | None = None
    """Sampling temperature; 0, the default, is greedy."""
    top_p: float | None = None
    """Keep the most likely tokens that together have this probability."""
    stop: Annotated[list[str] | None, Parameter(negative="")] = None
    """String that ends the output; can be given more than once."""
    logprobs: int | None = None
    """Log-probabilities of each token and of this many alternatives; needs --json."""

    top_k: Annotated[int | None, Parameter(group=_MORE_SAMPLING)] = None
    """Keep the k most likely tokens."""
    min_p: Annotated[float | None, Parameter(group=_MORE_SAMPLING)] = None
    """Drop tokens less likely than this share of the most likely one."""
    repetition_penalty: Annotated[float | None, Parameter(group=_MORE_SAMPLING)] = None
    """Above 1: make tokens that have occurred less likely."""
    presence_penalty: Annotated[float | None, Parameter(group=_MORE_SAMPLING)] = None
    """Subtracted from the logit of each token in the output."""
    frequency_penalty: Annotated[float | None, Parameter(group=_MORE_SAMPLING)] = None
    """Subtracted once for each occurrence in the output."""
    stop_token_ids: Annotated[list[int] | None, Parameter(group=_MORE_SAMPLING, negative="")] = None
    """Token that ends the output; can be given more than once."""
    ignore_eos: Annotated[bool | None, Parameter(group=_MORE_SAMPLING, negative="")] = None
    """Continue after the end-of-sequence token."""


@Parameter(name="*", group=_MORE_REQUEST)
@dataclass(frozen=True, kw_only=True)
class RequestFlags:
    """Flags with the scheduling arguments of requests, for the policies that look at them."""

    priority: int | None = None
    """Higher is more urgent."""
    deadline: float | None = None
    """Seconds within which a request must end, or it fails."""
    tenant: str | None = None
    """Tenant that sends the request."""
