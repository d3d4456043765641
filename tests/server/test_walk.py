"""The walks of docs/walk.md are those that a chat and a cold adapter take; all files of both are counted."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import Served, served_by, until
from support.tiny_models import build_adapter

from aioengine.kernels import available_backends

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = tuple(f"{ROOT / name}/" for name in ("aioengine", "kernels", "metrics", "schedulers"))
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "walk.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
NAMED = re.compile(r"`([\w/]+\.py)`:\s+((?:`[\w.]+`(?:,\s+)?)+)")

FILES = {"A chat": 54, "A cold adapter": 75}
"""The most files of the package that each may run through, whatever room they are in. Each has one less where
the draws find their tokens among the likeliest few."""
HEART = re.compile(r"schedulers/|aioengine/(?:\w+\.py|(?:adapters|core|executors|runtime)/)")
MOST_OF_HEART = 27
"""The most files of the rooms that are the engine, in a chat."""
LINES = {"A chat": 12_000, "A cold adapter": 16_200}
"""The most lines of these files."""


def named_in(title: str) -> dict[str, set[str]]:
    """Return the functions that a walk names, by file."""
    (text,) = (section for section in SECTIONS if section.startswith(f"{title}\n"))
    named: dict[str, set[str]] = {}
    for file, functions in NAMED.findall(text):
        named.setdefault(file, set()).update(re.findall(r"`([\w.]+)`", functions))
    return named


class Calls:
    """A profile function that notes which functions of the package are called while ``recorded`` lasts."""

    def __init__(self) -> None:
        self._found: dict[str, set[str]] | None = None

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        name = frame.f_code.co_filename
        if self._found is not None and event == "call" and name.startswith(FOLDERS):
            functions = self._found.setdefault(name[len(str(ROOT)) + 1 :], set())
            functions.add(frame.f_code.co_qualname.rpartition("<locals>.")[2])

    @contextmanager
    def recorded(self) -> Iterator[dict[str, set[str]]]:
        self._found = found = dict[str, set[str]]()
        try:
            yield found
        finally:
            self._found = None


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


async def chat(served: Served, model: str) -> None:
    """One streamed chat; until the engine has nothing left to do."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "stream": True,
    }
    async with served.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines()]
    assert lines[-2] == "data: [DONE]"
    await until(lambda: not served.engine._core.requests)


@pytest.mark.skipif(sys.platform != "linux" or "cpu" not in available_backends("cpu"), reason="of the CPU")
@pytest.mark.slow
async def test_the_walks_are_taken_and_run_through_few_files(
    tiny_text: Tiny, make_engine: MakeEngine, calls: Calls, tmp_path: Path
) -> None:
    """With one slot and room for one adapter in the CPU cache, so that an adapter takes the place of
    another."""
    other = build_adapter(tiny_text.model, tmp_path / "other", seed=2, r=3)
    limits = {"max_loras": 1, "max_cpu_loras": 1, "block_size": 16}
    async with make_engine(tiny_text, **limits) as engine, served_by(engine) as served:
        for name, path in (("a", tiny_text.adapters["a"]), ("other", other)):
            engine.register_adapter(name, path)
        await chat(served, "tiny")  # the first of its kind imports what it needs
        with calls.recorded() as base:
            await chat(served, "tiny")
        await chat(served, "a")
        with calls.recorded() as cold:
            await chat(served, "other")
    heart = sorted(filter(HEART.match, base))
    assert len(heart) <= MOST_OF_HEART, f"a chat runs through {len(heart)} files of the engine: {heart}"
    for title, called in (("A chat", base), ("A cold adapter", cold)):
        for file, functions in named_in(title).items():
            assert functions <= called.get(file, set()), f"{title}: {file}"
        lines = sum((ROOT / file).read_text(encoding="utf-8").count("\n") for file in called)
        assert len(called) <= FILES[title], f"{title} runs through {len(called)} files: {sorted(called)}"
        assert lines <= LINES[title], f"{title} runs through {lines:,} lines"
