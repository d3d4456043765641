"""For all tests: one compute thread, no time limit on generated examples, and timed tests apart.

One thread, because tiny tensors only lose by sharing the work. No limit, because it would say more of the
machine than of the code. ``--timed`` picks or leaves out the tests that look at the clock, so that they can
run when nothing else does; they are tried up to three times, since noise only ever makes things slower.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the servers and workers that tests start share the cores as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings
from support.ray_nodes import nodes

__all__ = ["nodes"]

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TIMED = [Path(__file__).parent / part for part in ("attacks", "fleet", "examples/test_proxies.py")]
"""Their tests watch clients that must not wait for long, or processes that must come up in time."""


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command that runs in the tests' process configures logging for all of it: that ends with the test."""
    loggers = [logging.getLogger(name) for name in ("", "uvicorn", "httpx", "httpcore", "asyncio")]
    handlers, levels = loggers[0].handlers[:], [logger.level for logger in loggers]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--timed", choices=("with", "only", "without"), default="with", help="tests of time")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the timed tests, and keeps those that ``--timed`` asks for."""
    for item in items:
        if any(part in (item.path, *item.path.parents) for part in TIMED):
            item.add_marker("timed")
        if item.get_closest_marker("timed"):
            item.add_marker(pytest.mark.flaky(reruns=2))
    wanted = config.getoption("timed")
    if wanted == "with":
        return
    kept = [item for item in items if bool(item.get_closest_marker("timed")) == (wanted == "only")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
