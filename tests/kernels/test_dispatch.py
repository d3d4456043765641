"""Which backend runs, and what is said if the best one cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from aioengine.kernels import dispatch
from aioengine.kernels.triton import attention, launch


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process finds out once about Triton and its GPU; here there is another one in each test."""
    cached = (dispatch._triton_backend, launch.limits, launch.capability)
    for each in cached:
        each.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    yield
    for each in cached:
        each.cache_clear()


def test_triton_that_cannot_launch_gives_way_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launch, "check_launch", fails)
    with caplog.at_level(logging.WARNING, logger="aioengine"):
        assert dispatch.get_backend("cuda").name == "torch"
    assert "Failed to find C compiler" in caplog.text and "python3-dev" in caplog.text
    with pytest.raises(ValueError, match="available: torch"):
        dispatch.get_backend("cuda", "triton")


def test_triton_that_launches_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: numbers)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert launch.capability(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            {"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 101376, "warp_size": 32},
            101376,
        ),
        ({"shared_memory_per_block": 65536, "warp_size": 64}, 65536),  # torch for AMD
    ],
)
def test_shared_memory_is_what_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, int], expected: int
) -> None:
    properties = SimpleNamespace(**said)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    found = launch.limits(torch.device("cuda"))
    assert found == (expected, said["warp_size"])
    for head_dim in (64, 128, 256):
        for rows in (16, 64):
            config = attention.default_config(head_dim, 16, 1, rows, found)
            assert config.num_warps * found.warp_size <= 256
            assert head_dim > 128 or config.num_stages == (5 if expected > 65536 else 3)


@pytest.mark.parametrize(
    ("hip", "numbers", "words"),
    [("6.4", (11, 0), ["MI200, MI300"]), (None, (7, 5), ["compute capability 7.5", "8.0"])],
)
def test_a_gpu_that_does_not_do_gives_way_to_torch(
    hip: str | None,
    numbers: tuple[int, int],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """AMD's for graphics: attention does not fit into the registers of warps of 32; 800 would be spilled of
    256. A T4 has half of the shared memory that attention takes, and no bfloat16: steps would fail there, and
    not the probe."""
    said = SimpleNamespace(shared_memory_per_block=65536, warp_size=32)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: numbers)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: said)
    with caplog.at_level(logging.WARNING, logger="aioengine"):
        assert dispatch.get_backend("cuda").name == "torch"
    assert all(word in caplog.text for word in words)
