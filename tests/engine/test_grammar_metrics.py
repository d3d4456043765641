"""What guided decoding tells."""

from __future__ import annotations

import pytest
from support.engine_fixtures import MakeEngine, Tiny

from aioengine.errors import RequestInvalid
from aioengine.grammars.limits import GrammarLimits
from aioengine.guided import Guide


@pytest.mark.slow
async def test_compiles_are_counted_by_outcome(tiny_text: Tiny, make_engine: MakeEngine) -> None:
    limits = GrammarLimits(compile_seconds=0.2)
    async with make_engine(tiny_text) as engine:
        guide = Guide(engine, limits=limits)
        held = [await guide.regex("a+"), await guide.regex("a+"), await guide.regex("b+")]
        with pytest.raises(RequestInvalid):
            await guide.regex("(")
        hard = {"type": "integer", "allOf": [{"multipleOf": 7919}, {"multipleOf": 7907}]}
        with pytest.raises(RequestInvalid, match="to compile"):
            await guide.json_schema(hard)
        text, _ = engine.metrics.expose()
        lines = [line for line in text.decode().splitlines() if line.startswith("aioengine_grammar")]
    counts = {"compiled": 2, "invalid": 1, "limit": 1, "overloaded": 0, "failed": 0}
    for outcome, count in counts.items():
        assert any(f'outcome="{outcome}"' in line and line.endswith(f" {count}.0") for line in lines), lines
    assert any("grammars_kept" in line and line.endswith(" 2.0") for line in lines)
    assert any("compile_seconds_count" in line and line.endswith(" 4.0") for line in lines)
    assert held
