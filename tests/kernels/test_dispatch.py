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


@pytest.mark.parametrize(
    ("hip", "numbers", "expected"),
    [(None, (8, 0), 80), (None, (9, 0), 90), (None, (12, 0), 120), ("6.4", (9, 4), 80), ("6.4", (12, 0), 80)],
)
def test_numbers_of_amd_s_gpus_are_none_of_nvidia_s(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, numbers: tuple[int, int], expected: int
) -> None:
    """An MI300 says 9.4, and has no more in common with an H100 than with other GPUs."""
    launch.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: numbers)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert launch.capability(torch.device("cuda")) == expected
    launch.capability.cache_clear()


def test_a_gpu_that_is_too_old_gives_way_to_torch(
    forgetful: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A T4 has half of the shared memory that attention takes, and no bfloat16: steps would fail there, and
    not the probe."""
    launch.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with caplog.at_level(logging.WARNING, logger="aioengine"):
        assert dispatch.get_backend("cuda").name == "torch"
    assert "compute capability 7.5" in caplog.text and "8.0" in caplog.text
    launch.capability.cache_clear()
