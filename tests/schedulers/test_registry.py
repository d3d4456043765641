"""Policies by name, by parts, by path, by entry point; with options."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aioengine import AsyncEngine, EngineConfig
from aioengine.errors import PolicyError
from aioengine.lab.policy_check.check import check_policy_contract
from aioengine.schedulers import (
    Composed,
    available_policies,
    compose,
    load_policy,
)
from aioengine.schedulers.parts.base import Arrival, Lookahead, NoPrefetch
from aioengine.schedulers.parts.replacement import GDSF
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.registry import available
from aioengine.schedulers.routing import load_router

NAMES = sorted(set(available_policies()) - {"oracle"})


def composed(spec: Any) -> Composed:
    policy = load_policy(spec)
    assert isinstance(policy, Composed)
    return policy


@pytest.mark.parametrize("name", [*NAMES, "priority+priority"])
@pytest.mark.slow
def test_they_keep_the_contract(name: str) -> None:
    found = check_policy_contract(lambda: load_policy(name), runs=1, turns=30)
    assert found.sound, found.broken


@pytest.mark.parametrize("kind", ["order", "replace", "prefetch", "preempt"])
def test_every_part_says_what_it_does(kind: str) -> None:
    for name, info in available(kind).items():
        assert info.summary.endswith("."), name
        assert info.kind == kind
        if name != "none":
            assert info.source, name
        if kind == "order":
            assert info.starvation_bound, name


def test_parts_by_text() -> None:
    policy = composed("edf+gdsf+lookahead:k=3")
    assert type(policy.order).__name__ == "EDF"
    assert isinstance(policy.replace, GDSF)
    assert isinstance(policy.prefetch, Lookahead)
    assert policy.prefetch.k == 3
    same = compose(order="edf", replace="gdsf", prefetch="lookahead:k=3", preempt="none")
    assert [type(p) for p in vars(same).values()] == [type(p) for p in vars(policy).values()]
    assert isinstance(composed("gdsf").order, Arrival), "a part alone: the others are the defaults"
    assert isinstance(composed("vllm+lru").prefetch, NoPrefetch), "what goes with the ordering"


def test_options() -> None:
    assert load_policy("fcfs:max_wait=2.5").max_wait == 2.5  # type: ignore[attr-defined]
    assert composed("sjf:max_wait=3").max_wait == 3.0
    vtc = composed("vtc:input_weight=3,output_weight=4").order
    assert (vtc.input_weight, vtc.output_weight) == (3, 4)  # type: ignore[attr-defined]
    table = {"order": {"name": "vtc", "weights": {"a": 2.0}}, "replace": "gdsf", "max_wait": 2}
    assert composed(table).max_wait == 2
    assert isinstance(load_policy({"name": "fcfs", "max_wait": 4}), FCFS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fcsf", "did you mean 'fcfs'"),
        ("edf+gdfs", "did you mean 'gdsf'"),
        ("edf+sjf", "two parts of the kind 'order'"),
        ("fcfs:max_wiat=1", "did you mean 'max_wait'"),
        ("fcfs:max_wait=soon", "max_wait='soon'"),
        ("fcfs:max_wait=-1", "max_wait=-1"),
        ("lookahead:k=0", "k=0"),
        ("lookahead:k", "name=value"),
        ("none.such:Thing", "cannot import"),
        ("aioengine.schedulers.policy:Decision", "not a subclass"),
        (
            {"order": "aioengine.schedulers.parts.replacement:LRU"},
            "a Replacement: register it as 'replace'",
        ),
        ("", "there is no ''"),
        ({"order": "lru"}, "order='lru'"),
        ({"order": 3}, "order=3"),
        ({"name": "oracle"}, "future"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_is_refused_with_the_reason(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy(spec)


def test_the_engine_takes_all_forms(tmp_path: Path) -> None:
    for policy in ("edf+gdsf", {"order": "edf"}, "aioengine.schedulers.policies.fcfs:FCFS:max_wait=2"):
        AsyncEngine(EngineConfig(model="m", policy=policy))
    path = tmp_path / "engine.toml"
    path.write_text('model = "m"\n[policy]\norder = {name = "vtc", weights = {a = 2.0}}\nmax_wait = 2')
    AsyncEngine(EngineConfig.from_toml(path))
    with pytest.raises(PolicyError, match="did you mean"):
        AsyncEngine(EngineConfig(model="m", policy={"ordr": "edf"}))


@pytest.mark.slow
def test_an_installed_package_adds_its_names(tmp_path: Path) -> None:
    package = Path(__file__).parents[2] / "examples" / "policy_package"
    source = tmp_path / "source"
    subprocess.run(["cp", "-r", str(package), str(source)], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(source)], check=True)
    code = (
        "from aioengine.schedulers import available_policies, load_policy\n"
        "policy = load_policy('take_turns+longest_idle:per_megabyte=0.5')\n"
        "print(type(policy.order).__name__, policy.replace.per_megabyte)\n"
        "print(available_policies()['take_turns'].where)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["TakeTurns", "0.5", "take_turns:TakeTurns"]


def test_a_broken_package_harms_only_those_who_name_it(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[aioengine.schedulers]\nbroken = no_such_module:Policy\n")
    code = (
        "from aioengine.schedulers import available_policies, load_policy\n"
        "assert 'fcfs' in available_policies() and 'broken' not in available_policies()\n"
        "load_policy('fcfs')\n"
        "try: load_policy('broken')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "cannot import no_such_module:Policy" in done.stdout


FILE = """
from aioengine.schedulers.parts.base import Ordering
from aioengine.schedulers.policies.by_key import SJF
from aioengine.schedulers.policies.fcfs import FCFS


class Mine(FCFS):
    pass


class MyOrder(SJF):
    pass


class NoPolicy:
    pass
"""


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a file of policies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_policy.py").write_text(FILE)
    return tmp_path


def test_policies_and_parts_in_a_file(in_folder: Path) -> None:
    mine = load_policy("my_policy.py:Mine:max_wait=3")
    assert isinstance(mine, FCFS)
    assert (type(mine).__name__, mine.max_wait) == ("Mine", 3.0)  # type: ignore[attr-defined]
    for spec in (
        "my_policy.py:MyOrder:input_weight=2+gdsf",
        f"{in_folder}/my_policy.py:MyOrder:input_weight=2+gdsf",
        {"order": {"name": "./my_policy.py:MyOrder", "input_weight": 2}, "replace": "gdsf"},
    ):
        policy = composed(spec)
        assert (type(policy.order).__name__, policy.order.input_weight) == ("MyOrder", 2)  # type: ignore[attr-defined]
        assert isinstance(policy.replace, GDSF)
    AsyncEngine(EngineConfig(model="m", policy="my_policy.py:Mine"))


def test_a_file_is_read_again_when_it_has_changed(in_folder: Path) -> None:
    first, second = (type(load_policy("my_policy.py:Mine")) for _ in range(2))
    assert first is second
    (in_folder / "my_policy.py").write_text(
        FILE.replace("class Mine(FCFS):", "class Mine(FCFS):\n    new = True")
    )
    assert load_policy("my_policy.py:Mine").new  # type: ignore[attr-defined]


@pytest.mark.parametrize("load", [load_policy, load_router])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, r"cannot import {}:Mine: FileNotFoundError: .*No such file"),
        ("class Mien: pass", r"there is no 'Mine' \(did you mean 'Mien'\?\); it defines Mien"),
        ("class Mine: pass", "not a subclass of (SchedulerPolicy or Ordering or|RouterPolicy)"),
        ("class Mine(:", "cannot import {}:Mine: SyntaxError"),
        ("1 / 0", "cannot import {}:Mine: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "cannot import {}:Mine: SystemExit: 3"),
        ("from aioengine import nothing", "cannot import {}:Mine: ImportError: cannot import name"),
        (
            "from aioengine.schedulers.policies.by_key import SJF as Policy\n"
            "from aioengine.schedulers.routing.routers.simple import LeastLoaded as Router\n"
            "class Mine({}):\n    def __init__(self) -> None:\n        raise RuntimeError('no licence')\n",
            "{}:Mine'?: cannot be built: RuntimeError: no licence",
        ),
    ],
)
def test_files_that_do_not_do(
    load: Callable[[str], object], source: str | None, message: str, in_folder: Path
) -> None:
    if source is not None:
        (in_folder / "mine.py").write_text(source.format("Policy" if load is load_policy else "Router"))
    with pytest.raises(ValueError, match=message.format("mine.py")):
        load("mine.py:Mine")


OUT_OF_RANGE = """
    fcfs:max_wait=-1 fcfs:max_wait=nan sjf:input_weight=-1 sjf:output_weight=nan sjf:input_weight=inf
    vtc:input_weight=-1 vtc:output_weight=nan drr:quantum=0 slora:clusters=-1 slora:age=-1
    lpm:window=0 lpm:age=-1 chameleon:queues=0 chameleon:refresh=0 chameleon:window=0 chameleon:age=-1
    lfu:half_life=-1 lfu:half_life=nan
"""


@pytest.mark.parametrize("spec", OUT_OF_RANGE.split())
def test_options_out_of_range_are_refused_by_name(spec: str) -> None:
    """And so are weights of clients that are not positive, which only a table can give."""
    _, _, option = spec.rpartition(":")
    with pytest.raises(ValueError, match=option.partition("=")[0] + "="):
        load_policy(spec)
    with pytest.raises(ValueError, match="weights: 'a'"):
        load_policy({"order": {"name": "vtc", "weights": {"a": 0.0}}})


def test_values_that_text_cannot_give_are_supplied_to_who_takes_them() -> None:
    made: list[str] = []

    def future() -> list[tuple[float, str]]:
        made.append("future")
        return [(1.0, "a")]

    supply = {"future": future, "start": lambda: 10.0}
    assert load_policy("fcfs", supply=supply)
    assert not made
    for spec in ("oracle", "edf+oracle", {"name": "oracle"}, {"replace": "oracle"}):
        policy = load_policy(spec, supply=supply)
        assert isinstance(policy, Composed)
        assert policy.replace.next_use("a", 0.0) == 11.0  # type: ignore[attr-defined]
    assert composed({"replace": {"name": "oracle", "future": []}}).replace.next_use("a", 0.0) == float("inf")  # type: ignore[attr-defined]
