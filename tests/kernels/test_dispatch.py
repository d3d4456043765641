"""Which backend runs, and what is said if the best one cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from aioengine.kernels import dispatch
from aioengine.kernels.triton import launch


@pytest.fixture
def forgetful() -> Iterator[None]:
    """A process finds out about Triton once."""
    dispatch._triton_backend.cache_clear()
    yield
    dispatch._triton_backend.cache_clear()


def test_triton_that_cannot_launch_gives_way_to_torch(
    forgetful: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "check_launch", fails)
    with caplog.at_level(logging.WARNING, logger="aioengine"):
        assert dispatch.get_backend("cuda").name == "torch"
    assert "Failed to find C compiler" in caplog.text and "python3-dev" in caplog.text
    with pytest.raises(ValueError, match="available: torch"):
        dispatch.get_backend("cuda", "triton")


def test_triton_that_launches_is_the_default(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "check_launch", lambda: launched.append(True))
    assert dispatch.get_backend("cuda").name == "triton" and launched == [True]
