"""What processes of the engine's write to their standard streams."""

from __future__ import annotations

import logging

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy

from aioengine.guided import Guide


@pytest.mark.slow
async def test_workers_never_wait_for_who_reads_their_output(
    tiny: Tiny,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Told so, Python writes a megabyte to standard error as it starts, many times what a pipe takes."""
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    caplog.set_level(logging.WARNING, "aioengine.workers")
    async with make_engine(tiny, executor="process") as engine:
        out = await engine.complete([5, 6], greedy(4))
    assert out.token_ids == tiny.expected([5, 6], 4)
    lines = [record.getMessage() for record in caplog.records if record.name == "aioengine.workers"]
    assert len(lines) > 1000 and all(line.startswith("worker 0: ") for line in lines)
    assert any("import 'torch'" in line for line in lines)
    assert "import 'torch'" not in capfd.readouterr().err


async def test_nor_do_those_that_compile_grammars(
    tiny_text: Tiny,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONVERBOSE", "1")
    async with make_engine(tiny_text) as engine:
        constraint = await Guide(engine).regex("a+")
        assert constraint.allowed([])
    assert "import '" not in capfd.readouterr().err
