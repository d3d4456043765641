"""Progress: what an engine tells while it loads, and who gets to see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aioengine import AsyncEngine, EngineConfig
from aioengine.cli.main import main

LINES = "\n".join(json.dumps({"prompt": f"Number {n}", "max_tokens": 2}) for n in range(5))


async def test_an_engine_tells_how_far_it_is(model: Path) -> None:
    told: list[tuple[str, int, int]] = []
    engine = AsyncEngine(EngineConfig(model=str(model), dtype="float32", kv_cache_memory="1MiB"))
    await engine.start(progress=lambda *progress: told.append(progress))
    await engine.stop()
    assert told[0][0].startswith("Preparing the kernels")
    stages, done, totals = zip(*told[1:], strict=True)
    assert set(stages) == {"Loading weights"}
    assert list(done) == sorted(done) and len(set(totals)) == 1
    assert done[-1] == totals[0] > 100_000


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_go_to_a_terminal_and_answers_to_the_file(
    terminal: bool,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "lines").write_text(LINES)
    monkeypatch.setattr("sys.stdin", (tmp_path / "lines").open())
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    if terminal:
        for name, value in {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)  # standard error is taken for a terminal
    assert main(["generate", "--model", str(model), "--kv-cache-memory", "8MiB", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["id"] for line in captured.out.splitlines()] == list(range(5))
    if terminal:
        assert "Loading weights" in captured.err and "5/5" in captured.err
        assert "\x1b[3" not in captured.err  # NO_COLOR: no colours
    else:
        assert captured.err == ""
