"""Position from which an activated LoRA adapter is applied.

Greenewald et al., "Activated LoRA: Fine-tuned LLMs for Intrinsics" (arXiv:2504.12397): the adapter is applied
to its invocation tokens and to all later ones. So the keys and values before them are the base model's.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

NOWHERE = sys.maxsize
"""A position beyond all tokens."""


def last_occurrence(tokens: Sequence[int], part: Sequence[int]) -> int | None:
    """Return where ``part`` occurs last in ``tokens``; None if it does not.

    Each token becomes one character, so Python's text search finds it in time linear in the lengths.
    """
    at = _text(tokens).find(_text(part))
    return None if at < 0 else len(tokens) - len(part) - at


def _text(tokens: Sequence[int]) -> str:
    """Convert the tokens to characters, the last one first."""
    return array("I", tokens[::-1]).tobytes().decode(_ENCODING, "surrogatepass")


_ENCODING = f"utf-32-{sys.byteorder[0]}e"
