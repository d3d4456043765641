"""For all tests: one compute thread, no time limit on generated examples, timed tests apart, long ones first.

One thread, because tiny tensors only lose by sharing the work. No limit, because it would say more of the
machine than of the code. ``--timed`` picks or leaves out the tests that look at the clock, so that they can
run when nothing else does; they are tried up to three times, since noise only ever makes things slower.
``--slow`` picks or leaves out those that take long (CONTRIBUTING.md says which).
Where several processes share the files, the long ones are given out first, so that all processes end at about
the same time. The garbage collector begins with the tests, and does not look at the modules again and again.
"""

import functools
import gc
import importlib.util
import logging
import os
import sys
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the servers and workers that tests start share the cores as well
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # where a test has two threads, they wait asleep

import torch
from hypothesis import settings
from support import preloaded
from support.quick_interpreter import quicken
from support.ray_nodes import nodes

import aioengine

__all__ = ["nodes"]

torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1":
    quicken()
# The same few examples each time, so that a test that passed passes; ``make fuzz`` looks for new ones.
FEW = 10 if os.environ.get("TRITON_INTERPRET") == "1" else 40  # the interpreter takes a second for each
settings.register_profile("same", deadline=None, max_examples=FEW, derandomize=True)
settings.register_profile("new", deadline=None, max_examples=200)
settings.load_profile("new" if "AIOENGINE_FUZZ_RUNS" in os.environ else "same")
gc.disable()  # until all tests are collected

TESTS = Path(__file__).parent

for folder in ("schedulers", "kernels", "metrics"):  # which lie beside aioengine/ in a checkout
    spec = importlib.util.find_spec(f"aioengine.{folder}")
    assert spec is not None and spec.submodule_search_locations is not None
    found, ours = set(spec.submodule_search_locations), {str(TESTS.parent / folder)}
    checkout = str(TESTS.parent / "aioengine") in aioengine.__path__
    assert not checkout or found == ours, (
        f"{folder} is of {found}, not of {ours}: two checkouts mix in this environment; use this one's own: "
        "make test"
    )

KINDS = ("slow", "timed")
"""Markers that split the tests."""
RAY = ("bad_model", "nodes", "serve_run", "serving", "serving_losses")
"""Files of tests/fleet that start Ray."""
TIMED = [
    *(TESTS / part for part in ("attacks", "examples/test_proxies.py")),
    *(TESTS / "fleet" / f"test_{name}.py" for name in RAY),
]
"""Their tests watch clients that must not wait for long, or processes that must come up in time."""
UNTIMED = [TESTS / "attacks" / f"test_{name}.py" for name in ("odd_values", "text_shares")]
"""Those among them that do neither."""
COST, BEGAN = "processor_seconds", pytest.StashKey[float]()
LONG = [
    TESTS / part
    for part in (
        "kernels/test_triton.py",
        "model/test_parallel.py",
        "kernels/test_triton_aot.py",
        "kernels/test_prebuilt.py",
        "kernels/test_batch_invariance.py",
        "cli/test_lab.py",
        "model/test_any_model.py",
        "simulation/test_simulation.py",
        "server/test_schemathesis.py",
        "engine/test_option_pairs.py",
        "lab/test_report.py",
        "model/test_lora_exact.py",
        "schedulers/test_fair.py",
        "engine/test_exact.py",
        "schedulers/test_hard_cases.py",
        "model/test_parallel_experts.py",
        "engine/test_process_parallel.py",
        "lab/test_run.py",
        "lab/test_quiet.py",
        "kernels/test_other_cpus.py",
    )
]
"""Files that take long for the number of their tests, the longest first."""


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A command that runs in the tests' process configures logging for all of it: that ends with the test."""
    loggers = [logging.getLogger(name) for name in ("", "uvicorn", "httpx", "httpcore", "asyncio")]
    handlers, levels = loggers[0].handlers[:], [logger.level for logger in loggers]
    yield
    loggers[0].handlers[:] = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def _joins_no_ray() -> Iterator[None]:
    """Most of Ray's functions start Ray where it is not there yet, and tests after that would run in it."""
    before = _has_joined_ray()
    yield
    if _has_joined_ray() and not before:
        sys.modules["ray"].shutdown()
        pytest.fail("the test has left this process joined to Ray")


def _has_joined_ray() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _processor_seconds() -> float:
    """Of this process, and of those that it started and waited for."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return own + preloaded.processor_seconds()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[BEGAN] = _processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        report.user_properties.append((COST, _processor_seconds() - item.stash[BEGAN]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With ``--durations``, print the files that took most processor time, on which a busy machine has less
    effect."""
    costs: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, seconds in getattr(report, "user_properties", ()):
            if name == COST:
                costs[report.nodeid.partition("::")[0]] += seconds
    if config.getoption("slow") == "without":
        terminalreporter.write_line("Slow tests were left out: `make test-all` has them.")
    if costs and config.getoption("durations"):
        terminalreporter.section("processor seconds")
        for file, seconds in costs.most_common(20):
            terminalreporter.write_line(f"{seconds:8.1f}  {file}")
        terminalreporter.write_line(f"{costs.total():8.1f}  all")


def pytest_addoption(parser: pytest.Parser) -> None:
    for kind in KINDS:
        choices = ("with", "without", "only")
        parser.addoption(f"--{kind}", choices=choices, default="with", help=f"tests that are {kind}")


def _keeps(config: pytest.Config, markers: Collection[str]) -> bool:
    """Whether a test with these markers is wanted."""
    wanted = {kind: config.getoption(kind) for kind in KINDS}
    return all(how == "with" or (kind in markers) == (how == "only") for kind, how in wanted.items())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is there once all is imported and collected stays until the end: it is not garbage."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is left at the end is reported as a leak by some libraries


@functools.cache
def is_timed(path: Path) -> bool:
    """Whether all tests of a file look at the clock."""
    return path not in UNTIMED and any(part in (path, *path.parents) for part in TIMED)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that has none of the few timed tests is not even imported where only these are wanted."""
    if config.getoption("timed") != "only" or collection_path.suffix != ".py":
        return None
    return None if is_timed(collection_path) or "timed" in collection_path.read_text() else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the timed tests, keeps those that are wanted, and has the long files first."""
    for item in items:
        if is_timed(item.path):
            item.add_marker("timed")
        if item.get_closest_marker("timed"):
            item.add_marker(pytest.mark.flaky(reruns=2))
    if "PYTEST_XDIST_WORKER" in os.environ:
        tests = Counter(item.path for item in items)
        places = {path: place for place, path in enumerate(LONG)}
        items.sort(key=lambda item: (places.get(item.path, len(LONG)), -tests[item.path], item.path))
    kept, left = [], []
    for item in items:
        (kept if _keeps(config, {marker.name for marker in item.iter_markers()}) else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept
