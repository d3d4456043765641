"""Continues a request whose first tokens another engine has generated and delivered.

Normally these tokens are computed in one piece, like a preempted request's. A replay decodes them again, one
in each step. A constraint leaves the sampler no other choice, so everything else (draws, penalties, shapes of
the steps) is the same as the first time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

from aioengine.errors import RequestInvalid
from aioengine.request import SamplingParams, StartedConstraint, TokenConstraint


def check_output(
    output: Sequence[int],
    params: SamplingParams,
    *,
    prompt_len: int,
    max_model_len: int,
    vocab: int,
    ends: Collection[int],
) -> None:
    """Check that an engine could have made this output. ``ends`` are the tokens that end an output. Raises
    RequestInvalid."""
    if len(output) > params.max_tokens:
        raise RequestInvalid(f"output: has {len(output)} tokens, more than max_tokens={params.max_tokens}")
    if prompt_len + len(output) > max_model_len:
        raise RequestInvalid(
            f"output: its {len(output)} tokens and the prompt's {prompt_len} are more than "
            f"max_model_len={max_model_len}"
        )
    if max(output) >= vocab:
        raise RequestInvalid(f"output: token {max(output)} is outside the vocabulary 0..{vocab - 1}")
    for index, token in enumerate(output[:-1]):
        if token in ends:
            raise RequestInvalid(f"output: token {token} at {index} ends the output, but more tokens follow")


def replayed(output: Sequence[int], constraint: TokenConstraint | None, *, vocab: int) -> TokenConstraint:
    """Build a constraint that allows only ``output``, token by token, and afterwards the same as
    ``constraint``."""
    if constraint is not None and hasattr(constraint, "begin"):
        return _ReplayedStarted(output, cast(StartedConstraint, constraint), vocab)
    return _Replayed(output, constraint, vocab)


class _Replayed:
    def __init__(self, output: Sequence[int], inner: TokenConstraint | None, vocab: int) -> None:
        self._output = output
        self._inner = inner
        self._all = b"\xff" * -(-vocab // 8)

    def _forced(self, index: int) -> bytes | None:
        if index >= len(self._output):
            return None
        token = self._output[index]
        mask = bytearray(len(self._all))
        mask[token // 8] = 1 << token % 8
        return bytes(mask)

    def allowed(self, output: Sequence[int]) -> bytes:
        forced = self._forced(len(output))
        if forced is not None:
            return forced
        return self._all if self._inner is None else self._inner.allowed(output)


class _ReplayedStarted(_Replayed):
    def __init__(self, output: Sequence[int], inner: StartedConstraint, vocab: int) -> None:
        super().__init__(output, inner, vocab)
        self._started = inner
        self._after: Sequence[int] = ()

    @property
    def slow(self) -> bool:
        return self._started.slow

    def begin(self, output: Sequence[int]) -> None:
        if len(output) >= len(self._output):
            self._started.begin(output)

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        mask = self._forced(len(output))
        if mask is not None:
            self._after = ()
            return mask
        mask = self._started.poll(output, seconds)
        self._after = getattr(self._started, "forced", ())
        return mask

    @property
    def forced(self) -> Sequence[int]:
        """Those of the inner constraint if the last ``poll`` asked it. (Proposed tokens may reach beyond
        ``output`` in a step that begins within it, and the next one is within it again.)"""
        return self._after
