"""A log that a thread writes."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest

from aioengine.cli.serving import background as module
from aioengine.cli.serving.background import BackgroundHandler


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("aioengine", logging.INFO, "", 0, text, None, None)


def test_everything_is_written_in_order(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    handler = BackgroundHandler(fd)
    for line in range(1000):
        handler.handle(record(str(line)))
    assert handler.drain(20) and handler.dropped == 0
    os.close(fd)
    assert (tmp_path / "log").read_text().split() == [str(line) for line in range(1000)]


def test_what_finds_no_room_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINES", 200)
    reading, writing = os.pipe()
    handler = BackgroundHandler(writing)
    for _ in range(500):
        handler.handle(record("x" * 999))
    dropped = handler.dropped
    assert dropped in (299, 300) and not handler.drain(0.05), "the thread may have taken the first already"
    taken = 0
    while taken < (500 - dropped) * 1000:
        taken += len(os.read(reading, 2**16))
    assert handler.drain(20)
    os.close(reading)
    handler.handle(record("to nobody"))
    assert handler.drain(20) and handler.dropped == dropped + 1


def test_the_end_waits_for_the_last_lines_unless_nobody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 20)
    reading, writing = os.pipe()
    handler = BackgroundHandler(writing)
    handler.handle(record("heard"))
    handler.close()
    assert os.read(reading, 100) == b"heard\n"
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.05)
    handler.handle(record("x" * 200_000))
    handler.close()
    threading.Thread(target=lambda: [os.read(reading, 2**16) for _ in range(4)], daemon=True).start()
    assert handler.drain(20)


def test_a_line_that_cannot_be_formatted_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    handler = BackgroundHandler(os.open(os.devnull, os.O_WRONLY))
    handler.handle(logging.LogRecord("aioengine", logging.INFO, "", 0, "%d", ("x",), None))
    assert "Logging error" in capsys.readouterr().err
