"""Shortest job first."""

from __future__ import annotations

from aioengine.schedulers.parts.fixed_key import FixedKeyOrdering
from aioengine.schedulers.policy import RequestView


class SJF(FixedKeyOrdering):
    """Shortest job first: the least prompt plus expected output tokens.

    key = input_weight x prompt_tokens + output_weight x expected_tokens

    How long an output will be is what its caller says that it expects, or else what the request allows
    itself (``max_tokens``). The mean waiting time is the least if that is exact; a long request may wait
    while shorter ones come.

    Args:
        input_weight: What a prompt token counts, >= 0.
        output_weight: What an expected output token counts, >= 0.
    """

    source = "Smith, 'Various optimizers for single-stage production', Naval Res. Logist. Q. 3, 1956"
    starvation_bound = "none"

    def __init__(self, input_weight: float = 1.0, output_weight: float = 1.0) -> None:
        super().__init__()
        for option, weight in (("input_weight", input_weight), ("output_weight", output_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{option}={weight}: must be >= 0 and finite")
        self.input_weight, self.output_weight = input_weight, output_weight

    def fixed_key(self, request: RequestView) -> float:
        return self.input_weight * request.prompt_tokens + self.output_weight * request.expected_tokens
