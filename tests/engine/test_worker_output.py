"""What processes of the engine's write to their standard streams."""

from __future__ import annotations

import pytest
from support.engine_fixtures import MakeEngine, Tiny

from aioengine.guided import Guide


async def test_what_compiles_grammars_writes_nothing_there(
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
