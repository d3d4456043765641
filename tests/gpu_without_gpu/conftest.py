"""A model that takes little time on a GPU made of CPU memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    return build_model(tmp_path_factory.mktemp("model"), "llama", **small)
