"""A model and adapters for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_chat import build_chat_model
from support.tiny_models import build_adapter


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="package")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the four adapters that the demo asks for, and its requests beside it."""
    folder = tmp_path_factory.mktemp("examples") / "adapters"
    for seed, name in enumerate(("sql", "json", "sentiment", "pirate")):
        build_adapter(model, folder / name, seed=seed, r=4)
    requests = Path(__file__).resolve().parents[2] / "examples" / "demo.jsonl"
    (folder.parent / "demo.jsonl").write_text(requests.read_text())
    return folder
