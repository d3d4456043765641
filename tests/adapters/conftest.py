"""Fixtures of the adapters' tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.engine_fixtures import tiny, tiny_of
from support.peft_files import make

__all__ = ["tiny", "tiny_of"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    make(folder, target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A valid adapter that the test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))
