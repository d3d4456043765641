"""The table of docs/models.md: what runs a family, and on which linears adapters can be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.any_models import COMMON, FAMILIES, config_of

from aioengine.errors import ConfigError
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import SUPPORTED_ARCHITECTURES, ModelSpec

REFUSED = {
    "t5": {"d_model": 32, "num_layers": 1, "vocab_size": 128},
    "bart": {"d_model": 32, "vocab_size": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 1},
    "jamba": COMMON,
    "lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": COMMON,
}
SLOWER = {"jetmoe": 0.5, "longcat_flash": 0.6}
"""Tokens a second of 32 requests, as a share of what `generate` makes of one static batch, where it is
below 0.8: their experts are products of torch, which prepares itself for each new number of rows."""
HEADING = """| Family | Class | Runs | Adapters on |
|---|---|---|---|
"""


def row(family: str, fields: dict[str, object]) -> str:
    """What comes of a tiny model of the family, by looking at its configuration alone."""
    with tempfile.TemporaryDirectory() as folder:
        config_of(family, **fields).save_pretrained(folder)
        native = family in SUPPORTED_ARCHITECTURES.values()
        try:
            spec = read_spec(Path(folder), "native" if native else "transformers")
        except ConfigError as error:
            return f"| {family} | | refused: {_reason(str(error), folder)} | |"
    if native:
        architecture = next(name for name, value in SUPPORTED_ARCHITECTURES.items() if value == family)
        return f"| {family} | {architecture} | natively | {_modules(spec)} |"
    architecture, how = spec.ran_by.split(", by transformers, ")
    speed = f" ({SLOWER[family]} of a static batch's speed)" if family in SLOWER else ""
    return f"| {family} | {architecture} | {how}{speed} | {_modules(spec)} |"


def _modules(spec: ModelSpec) -> str:
    kinds = map(spec.kind_of, spec.targets(None))
    names = dict.fromkeys(kind.partition(" ")[0].rpartition(".")[2] for kind in kinds)
    return ", ".join(f"`{name}`" for name in names)


def _reason(text: str, folder: str) -> str:
    text = text.removeprefix(folder).removeprefix("/config.json").removeprefix(": ")
    return text.partition(";")[0]


def rows() -> Iterator[str]:
    for family in SUPPORTED_ARCHITECTURES.values():
        yield row(family, {})
    for family in FAMILIES:
        if family not in SUPPORTED_ARCHITECTURES.values():
            yield row(family, {})
    for family, fields in REFUSED.items():
        yield row(family, fields)


def table() -> str:
    """The table, as the page has it."""
    return HEADING + "\n".join(rows()) + "\n"
