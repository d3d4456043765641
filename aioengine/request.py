"""SamplingParams and RequestOptions: what a caller sends."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypedDict, runtime_checkable

import msgspec
from msgspec import Meta

from aioengine.checks import AnySeconds, Count, Whole, check_fields, check_value
from aioengine.errors import RequestInvalid

Prompt = str | list[int] | list[dict[str, Any]]
"""Text, token ids, or chat messages (rendered with the model's chat template)."""

FinishReason = Literal["stop", "length", "abort"]

PoolingKind = Literal["auto", "mean", "last", "cls", "classify"]
"""Way to make one vector from a prompt's hidden states after the last norm: their mean, or the last or first
token's state. "auto": as in the adapter's sentence-transformers configuration, or else the model's, or else
the mean. "classify" gives the logits of the adapter's trained head, by default of the last token."""


@runtime_checkable
class TokenConstraint(Protocol):
    """Says which tokens may come next, for example for guided decoding (:mod:`aioengine.guided`). It is asked
    where the sampler runs, in another thread than the event loop's, once for each token."""

    def allowed(self, output: Sequence[int]) -> bytes:
        """Return the tokens that may follow ``output``, all tokens generated so far, and depend on it alone.
        (One that remembers how many it has seen reads ``output[seen:]``.)

        Token ``t`` is allowed if bit ``t % 8`` (the lowest is 0) of byte ``t // 8`` is set; tokens beyond the
        end are not. To let the output end, allow an end-of-sequence token. The request fails if no token is
        allowed, or if this method raises.
        """


class StartedConstraint(TokenConstraint, Protocol):
    """A constraint whose answer is computed elsewhere, beside the model's forward pass. If it is late, it is
    asked again in the next step."""

    @property
    def slow(self) -> bool:
        """Whether steps should not wait for it at all, unless they contain no other request."""

    def begin(self, output: Sequence[int]) -> None:
        """Begin to compute ``allowed(output)``. Called before the forward pass; returns at once."""

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        """Return ``allowed(output)`` if it is known within ``seconds``; else None."""

    @property
    def forced(self) -> Sequence[int]:
        """Tokens that must follow the only token that the last answer of ``poll`` allows, as far as that is
        known. They are chosen without asking again."""


Wanted = str | Mapping[str, float] | None
"""Adapter that a request names, or several with weights; None is the base model."""

MAX_MIXED = 8  # adapters in one mix
_Text = Annotated[
    str, Meta(pattern=r"\A[^\ud800-\udfff]+\Z", extra={"is": "text, not empty and without lone surrogates"})
]
_Constraint = Annotated[TokenConstraint, Meta(extra={"is": "an object with a method allowed(output)"})]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Bias = Annotated[float, Meta(ge=-100, le=100)]
_Logprobs = Annotated[int, Meta(ge=0, le=20)]
_Int64 = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Parameters that say how tokens are chosen, and when to stop.

    The filters apply in this order: logit bias, penalties, constraint, temperature, top-k, top-p, min-p.
    Raises :class:`~aioengine.errors.RequestInvalid` on construction if a value is out of range.
    """

    max_tokens: _Int64 = 256
    """Upper bound on generated tokens; 0, with ``prompt_logprobs`` or ``pooling`` only, generates none."""
    min_tokens: Whole = 0
    """Nothing ends the output before this many tokens, unless ``constraint`` allows no other."""
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: _Int64 = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Keep the most likely tokens whose probabilities add up to this; 1 keeps all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Drop tokens less likely than ``min_p`` times the most likely one."""
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output."""
    presence_penalty: _Penalty = 0.0
    """Subtracted from the logit of each token that the output contains."""
    frequency_penalty: _Penalty = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    logit_bias: Mapping[int, float] = {}
    """Added to the logits of these tokens, -100..100 each."""
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None
    """The draws depend only on it and the position; None: one is drawn for each request."""
    stop: Sequence[_Text] | str = ()
    """Strings that end the output; the output is cut before the first one found."""
    include_stop_str_in_output: bool = False
    """Leave the stop string, or the text of the token, that ends the generation in the output's text."""
    stop_token_ids: Sequence[Whole] = ()
    """Tokens that end the output."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token."""
    logprobs: _Logprobs | None = None
    """Report the log-probability of each output token, and of this many most likely ones (0..20)."""
    prompt_logprobs: _Logprobs | None = None
    """The same for each token of the prompt except the first, which is then computed in full."""
    pooling: PoolingKind | None = None
    """Return a vector in place of tokens, with ``max_tokens=0``. The prompt is computed in full."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the output's text."""
    constraint: _Constraint | None = None
    """Constraint that the output must satisfy; sampling chooses among the tokens that it allows."""

    def __post_init__(self) -> None:
        set_ = msgspec.structs.force_setattr
        set_(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple(self.stop))
        set_(self, "stop_token_ids", _tuple(self.stop_token_ids))
        if self.logit_bias:
            set_(self, "logit_bias", _checked_bias(self.logit_bias))
        check_fields(self, RequestInvalid)
        if not self.max_tokens and self.prompt_logprobs is None and self.pooling is None:
            raise RequestInvalid("max_tokens=0: must be >= 1, if neither prompt_logprobs nor pooling is set")
        if self.min_tokens > self.max_tokens:
            raise RequestInvalid(f"min_tokens={self.min_tokens}: must be <= max_tokens={self.max_tokens}")
        if self.seed is not None and self.seed >= 2**64:
            raise RequestInvalid(f"seed={self.seed}: must be less than 2**64")
        others = (self.prompt_logprobs, self.constraint) != (None, None) or self.max_tokens
        if self.pooling is not None and others:
            raise RequestInvalid("pooling needs max_tokens=0, no prompt_logprobs, no constraint")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def changes_logits(self) -> bool:
        """Whether the token is chosen from changed logits, not from the model's own."""
        return bool(self.min_tokens or self.logit_bias) or self.constraint is not None or self.has_penalties

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether the most likely tokens are asked for, and nothing else."""
        others = (self.logprobs, self.prompt_logprobs, self.pooling)
        return self.greedy and not self.changes_logits and others == (None, None, None)


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Return the parameters of one of several answers, from 0 on: all but the first have another seed."""
    if params.seed is None or choice == 0:
        return params
    # The odd multiplier (2**64 / golden ratio) keeps answers to requests with seeds 1, 2, 3, ... different.
    return msgspec.structs.replace(params, seed=(params.seed + choice * 0x9E3779B97F4A7C15) % 2**64)


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapter and scheduling arguments of a request: the keyword arguments of ``AsyncEngine.generate``.

    Raises :class:`~aioengine.errors.RequestInvalid` on construction if a value is out of range.
    """

    request_id: _Text | None = None
    """A name that no other open request has; None: one is made up."""
    adapter: _Text | Mapping[str, float] | None = None
    """An adapter, also as "name@version"; or several with weights: their weighted sum (docs/adapters.md)."""
    priority: int = 0
    """Higher is more urgent, for policies that look at it."""
    deadline: AnySeconds | None = None
    """Seconds from now within which the request must end, the look-up of its adapter included."""
    tenant: _Text | None = None
    """Tenant that sends the request, for policies that are fair between tenants."""
    expected_tokens: Count | None = None
    """Expected length of the output, for policies that use it; None: ``max_tokens``."""
    cache_salt: _Text | None = None
    """The prefix cache is shared with requests of the same salt only."""
    output: Sequence[Whole] = ()
    """Tokens that another engine has generated and delivered, with this seed; only new output is yielded."""
    replay: bool = False
    """Decode ``output`` one token a step, so that the rest is equal to the last bit; so do ``logprobs``."""

    def __post_init__(self) -> None:
        set_ = msgspec.structs.force_setattr
        set_(self, "output", _tuple(self.output))
        if isinstance(self.adapter, Mapping):
            mix = _checked_mix(self.adapter)
            set_(self, "adapter", next(iter(mix)) if [*mix.values()] == [1.0] else mix)
        check_fields(self, RequestInvalid)

    @property
    def mix(self) -> Mapping[str, float] | None:
        """The adapters with their weights, if it is not one as it is."""
        return self.adapter if isinstance(self.adapter, Mapping) else None

    @property
    def named(self) -> list[str]:
        """The adapters that it names."""
        return [self.adapter] if isinstance(self.adapter, str) else list(self.adapter or ())


def _checked_mix(weights: Mapping[str, float]) -> dict[str, float]:
    if not 1 <= len(weights) <= MAX_MIXED:
        raise RequestInvalid(f"adapter: a mix of {len(weights)} adapters; it must have 1 to {MAX_MIXED}")
    for name, weight in weights.items():
        check_value("adapter", name, _Text, RequestInvalid)
        check_value(f"adapter[{name!r}]", weight, _Bias, RequestInvalid)
    ordered = sorted(weights, key=lambda name: (name.partition("@")[0], name))  # as without versions
    return {name: float(weights[name]) for name in ordered}


class RequestKeywords(TypedDict, total=False):
    """Keyword arguments of ``AsyncEngine.generate``; :class:`RequestOptions` describes them."""

    request_id: str | None
    adapter: Wanted
    priority: int
    deadline: float | None
    tenant: str | None
    expected_tokens: int | None
    cache_salt: str | None
    output: Sequence[int]
    replay: bool


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """Log-probabilities (natural log, of the unmodified model distribution) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token id, logprob) pairs, best first; as many as ``logprobs`` asked for."""


def _tuple(value: Any) -> Any:
    """Return a list as a tuple; anything else stays as it is, to be refused."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _checked_bias(bias: Any) -> dict[int, float]:
    """Return the bias with integers as keys, which are text in JSON."""
    try:
        return msgspec.convert(bias, dict[_Int64, _Bias], strict=False)
    except msgspec.ValidationError as error:
        raise RequestInvalid(
            f"logit_bias={bias!r}: must map token ids to numbers in [-100, 100]: {error}"
        ) from None


_DEFAULTS = SamplingParams()


def pack_params(params: SamplingParams) -> dict[str, Any]:
    """Return the fields, but the constraint, that differ from their defaults, for another process."""
    fields = msgspec.structs.asdict(params)
    del fields["constraint"]
    return {name: value for name, value in fields.items() if value != getattr(_DEFAULTS, name)}
