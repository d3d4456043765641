from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.cpu_levels import at_level
from support.engine_fixtures import make_engine, tiny, tiny_of
from support.selection import mostly_slow

from aioengine.kernels.cpu import build

__all__ = ["make_engine", "tiny", "tiny_of"]

LEVELS = sorted({next(iter(build.levels())), "generic"})


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What is allocated without being initialised is NaN: outputs, scratch, and parts of split inputs."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=mostly_slow(LEVELS, next(iter(build.levels()))))
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """The library that everything uses is the one for this instruction set."""
    with at_level(request.param):
        yield request.param
