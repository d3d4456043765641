"""docs/models.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.any_models import COMMON, FAMILIES, config_of

from aioengine.errors import ConfigError
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import SUPPORTED_ARCHITECTURES, ModelSpec

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
REFUSED = {
    "t5": {"d_model": 32, "num_layers": 1, "vocab_size": 128},
    "bart": {"d_model": 32, "vocab_size": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 1},
    "jamba": COMMON,
    "lfm2": {**COMMON, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": COMMON,
}


def row(family: str, folder: Path) -> str:
    """What comes of a tiny model of the family, by looking at its configuration alone."""
    config_of(family, **REFUSED.get(family, {})).save_pretrained(folder)
    native = {name: architecture for architecture, name in SUPPORTED_ARCHITECTURES.items()}
    try:
        spec = read_spec(folder, "native" if family in native else "transformers")
    except ConfigError as error:
        reason = str(error).removeprefix(str(folder)).removeprefix("/config.json").removeprefix(": ")
        return f"| {family} | | refused: {reason.partition(';')[0]} | |"
    if family in native:
        return f"| {family} | {native[family]} | natively | {modules(spec)} |"
    architecture, how = spec.ran_by.split(", by transformers, ")
    return f"| {family} | {architecture} | {how} | {modules(spec)} |"


def modules(spec: ModelSpec) -> str:
    kinds = map(spec.kind_of, spec.targets(None))
    names = dict.fromkeys(kind.partition(" ")[0].rpartition(".")[2] for kind in kinds)
    return ", ".join(f"`{name}`" for name in names)


@pytest.mark.slow
def test_the_table_is_what_the_code_makes(tmp_path: Path) -> None:
    table = PAGE.partition("| Family | Class | Runs | Adapters on |\n|---|---|---|---|\n")[2].partition(
        "\n\n"
    )[0]
    families = dict.fromkeys([*SUPPORTED_ARCHITECTURES.values(), *FAMILIES, *REFUSED])
    found = [row(family, tmp_path / family) for family in families]
    assert re.sub(r" \([\d.]+ of a static batch's speed\)", "", table).splitlines() == found


def test_the_page_names_the_settings_and_the_files_that_it_speaks_of() -> None:
    for path in re.findall(r"`((?:aioengine|kernels|tests|benchmarks)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).is_file(), path
