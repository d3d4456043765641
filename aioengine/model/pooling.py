"""Turns the last hidden states of a prompt into one vector: pooling, and an adapter's trained head.

Everything here is a sum over tokens, so the parts of a prompt that is computed in several steps are added up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from aioengine.errors import ConfigError
from aioengine.step import SequenceWork

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["mean", "last", "cls"]
POOLING_FILE = "1_Pooling/config.json"
"""File in which sentence-transformers says how a model pools."""
MAX_POOLING_BYTES = 1 << 16
_MAX_CONFIG_BYTES = 1 << 20
_NAMES: dict[str, Kind] = {"mean": "mean", "lasttoken": "last", "cls": "cls"}
_NAMES |= {"mean_tokens": "mean", "cls_token": "cls"}
"""Names of ``pooling_mode``, and in flags after ``pooling_mode_``."""


class Head(NamedTuple):
    """A trained linear over the pooled hidden state, as ``AutoModelForSequenceClassification`` has it."""

    weight: Tensor
    """[labels, hidden], float32."""
    bias: Tensor | None
    """[labels], float32."""

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


class Pooled(NamedTuple):
    """Part of a sequence's vector that one step computes."""

    values: list[float]
    """[hidden] or [labels], to be added to what earlier steps gave; empty if ``error``."""
    error: str | None = None


def parse_pooling(data: bytes) -> Kind:
    """Read sentence-transformers' pooling configuration. Raises ValueError if the mode is not mean, last
    token or first token, and for content that is no such configuration."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not a JSON object: {error}") from error
    named = fields.get("pooling_mode")
    flags = [mode for mode, on in fields.items() if mode.startswith("pooling_mode_") and on is True]
    shown = named if isinstance(named, str) else ", ".join(flags) or "none"
    if (found := _NAMES.get(shown.removeprefix("pooling_mode_"))) is None:
        raise ValueError(f"pooling mode {shown[:200]}: only one of mean, lasttoken and cls is supported")
    return found


def model_pooling(model: Path) -> Kind:
    """Return how the model in this folder pools: the mean, unless sentence-transformers' configuration says
    otherwise. Raises ConfigError if that is not supported."""
    file = model / POOLING_FILE
    if not file.is_file():
        return "mean"
    try:
        return parse_pooling(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from error


def pool(
    sequences: Sequence[SequenceWork],
    normed: Callable[[list[int]], Tensor],
    heads: Sequence[Head | None],
    kinds: Sequence[Kind | None],
    default: Kind,
) -> dict[int, Pooled]:
    """Pool the sequences of a step that ask for it.

    Args:
        normed: The hidden states after the model's last norm of some of the step's tokens: [n, hidden].
        heads: By slot.
        kinds: By slot: its adapter's pooling, if the adapter chooses one.
        default: The model's pooling.

    Returns what each gives, by index.
    """
    parts: list[tuple[int, SequenceWork, Kind, Head | None, Sequence[int]]] = []
    found: dict[int, Pooled] = {}
    end = 0
    for index, work in enumerate(sequences):
        begin, asked = end, work.params.pooling
        end += len(work.tokens)
        own, head = (kinds[work.slot], heads[work.slot]) if work.slot >= 0 else (None, None)
        kind: Kind = own or ("last" if asked == "classify" else default)
        if asked == "classify" and head is None:
            found[index] = Pooled([], "the adapter has no trained classification head")
            continue
        if asked == "mean" or asked == "last" or asked == "cls":
            kind = asked
        if asked is not None and (rows := _rows(kind, work, begin, end)):
            parts.append((index, work, kind, head if asked == "classify" else None, rows))
    if not parts:
        return found
    hidden = normed([row for *_, rows in parts for row in rows]).float()
    each = hidden.split_with_sizes([len(rows) for *_, rows in parts])
    for (index, work, kind, head, _), mine in zip(parts, each, strict=True):
        value = mine.sum(0)
        if kind == "mean":
            value = value / len(work.history)
        if head is not None:
            value = head.weight @ value
            if head.bias is not None and work.sample:
                value = value + head.bias
        found[index] = Pooled(value.tolist())
    return found


def _rows(kind: Kind, work: SequenceWork, begin: int, end: int) -> Sequence[int]:
    match kind:
        case "mean":
            return range(begin, end)
        case "last":
            return [end - 1] if work.sample else []
        case "cls":
            return [begin] if work.start == 0 else []


def read_label_names(model: Path | None) -> list[str]:
    """Return the ``id2label`` of the model's ``config.json``; empty if it has none. Blocking."""
    try:
        file = None if model is None else model / "config.json"
        if file is None or file.stat().st_size > _MAX_CONFIG_BYTES:
            return []
        named = json.loads(file.read_bytes()).get("id2label") or {}
        return [str(named[str(index)])[:200] for index in range(len(named))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
