"""The walk of docs/walk.md is the one that a request and an adapter really take: a tracer follows them."""

from __future__ import annotations

import ast
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import Served, served_by, until
from support.tiny_models import build_adapter

from aioengine.kernels import available_backends

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = tuple(f"{ROOT / name}/" for name in ("aioengine", "kernels", "metrics", "schedulers"))
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "walk.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
STEP = re.compile(r"^\d+\. `([\w/]+\.py)`: ((?:`[\w.]+`(?:, | and )?)+)", re.MULTILINE)
ASKED = re.compile(r"^- `([\w/]+\.py)`", re.MULTILINE)


class Step(NamedTuple):
    file: str
    functions: Sequence[str]


def section(title: str) -> str:
    (found,) = (text for text in SECTIONS if text.startswith(f"{title}\n"))
    return found


def steps(title: str) -> list[Step]:
    return [Step(file, re.findall(r"`([\w.]+)`", names)) for file, names in STEP.findall(section(title))]


def asked(title: str) -> list[str]:
    return ASKED.findall(section(title))


REQUEST, ADAPTER = steps("One request"), steps("One adapter")
BESIDE_REQUEST, BESIDE_ADAPTER = asked("Also used by a request"), asked("Also used by an adapter")
ON_THE_CLOCK = set(asked("On the clock"))
"""They run beside requests, now and then."""


class Trace:
    """What was called in this package."""

    def __init__(self) -> None:
        self.functions: dict[str, set[str]] = {}
        """By file."""
        self.callers: dict[str, set[str | None]] = {}
        """By file: the other files of the package that call into it, with foreign code between them or not.
        None: a task or a thread begins in it."""

    @property
    def files(self) -> set[str]:
        return self.functions.keys() - ON_THE_CLOCK

    def add(self, frame: FrameType) -> None:
        file = file_of(frame)
        if file is not None:
            self.functions.setdefault(file, set()).add(frame.f_code.co_qualname.replace(".<locals>", ""))
            caller = frame.f_back
            while caller is not None and file_of(caller) is None:
                caller = caller.f_back
            self.callers.setdefault(file, set()).add(None if caller is None else file_of(caller))


def file_of(frame: FrameType) -> str | None:
    name = frame.f_code.co_filename
    return name[len(str(ROOT)) + 1 :] if name.startswith(FOLDERS) else None


class Calls:
    """A profile function that traces while ``recorded`` lasts."""

    def __init__(self) -> None:
        self._trace: Trace | None = None

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if self._trace is not None and event == "call":
            self._trace.add(frame)

    @contextmanager
    def recorded(self) -> Iterator[Trace]:
        self._trace = trace = Trace()
        try:
            yield trace
        finally:
            self._trace = None


@pytest.fixture
def calls() -> Iterator[Calls]:
    """In every thread that is started from now on, and in this one."""
    before, calls = sys.getprofile(), Calls()
    threading.setprofile(calls)
    sys.setprofile(calls)
    try:
        yield calls
    finally:
        sys.setprofile(before)
        threading.setprofile(before)


def check(trace: Trace, named: set[str]) -> None:
    assert sorted(trace.files - named) == [], "touched, and not in docs/walk.md: name them there"
    assert sorted(named - trace.files) == [], "named in docs/walk.md, and not touched"


async def stream(served: Served, model: str) -> None:
    """One request; until the engine has nothing left to do."""
    drawn = {"temperature": 2, "seed": 1}  # a token that is not among the most likely few
    body = {"model": model, "prompt": "hello", "max_tokens": 3, "stream": True, **drawn}
    async with served.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines()]
    assert lines[-2] == "data: [DONE]"
    await until(lambda: not served.engine.stats().running)


@pytest.mark.skipif(sys.platform != "linux" or "cpu" not in available_backends("cpu"), reason="of the CPU")
@pytest.mark.slow
async def test_the_files_are_those_that_a_request_and_an_adapter_touch(
    tiny_text: Tiny, make_engine: MakeEngine, calls: Calls, tmp_path: Path
) -> None:
    """With one slot and room for one adapter in the CPU cache, so that an adapter takes the place of another.

    Each file of a walk is called by one before it, or begins a task or a thread: who follows the calls from
    file to file needs no other.
    """
    other = build_adapter(tiny_text.model, tmp_path / "other", seed=2, r=3)
    limits = {"max_loras": 1, "max_cpu_loras": 1, "block_size": 16}
    async with make_engine(tiny_text, **limits) as engine, served_by(engine) as served:
        await stream(served, "tiny")  # the first of its kind imports what it needs
        with calls.recorded() as request:
            await stream(served, "tiny")
        engine.register_adapter("a", tiny_text.adapters["a"])
        engine.register_adapter("b", tiny_text.adapters["a"])
        engine.register_adapter("other", other)
        await stream(served, "a")
        await stream(served, "b")
        with calls.recorded() as adapter:
            await stream(served, "other")
    files = {step.file for step in REQUEST} | set(BESIDE_REQUEST)
    check(request, files)
    check(adapter, files | {step.file for step in ADAPTER} | set(BESIDE_ADAPTER))
    for trace, walk in ((request, REQUEST), (adapter, ADAPTER)):
        before: set[str | None] = {None}
        for file, functions in walk:
            assert set(functions) <= trace.functions[file], file
            assert len(before) == 1 or before & trace.callers[file], f"{file}: {trace.callers[file]}"
            before.add(file)


def test_the_walk_is_short_and_every_file_is_named_once() -> None:
    assert 0 < len(REQUEST) <= 25 and 0 < len(ADAPTER) <= 22
    for walk, beside in ((REQUEST, BESIDE_REQUEST), (ADAPTER, BESIDE_ADAPTER)):
        files = [step.file for step in walk] + beside
        assert len(files) == len(set(files))
    assert not set(BESIDE_ADAPTER) & {*BESIDE_REQUEST, *(step.file for step in REQUEST)}


@pytest.mark.parametrize(
    ("file", "function"), [(step.file, name) for step in (*REQUEST, *ADAPTER) for name in step.functions]
)
def test_each_function_is_there(file: str, function: str) -> None:
    body: list[ast.stmt] = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    for name in function.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [node for node in body if isinstance(node, kinds) and node.name == name]
        assert found, f"{file} has no {function}"
        body = found[0].body
