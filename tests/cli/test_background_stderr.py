"""Standard error that a thread writes."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from aioengine.cli import background_stderr as module
from aioengine.cli.background_stderr import BackgroundFile, background_stderr


def test_everything_is_written_in_order(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    file = BackgroundFile(fd)
    for line in range(1000):
        file.write(b"%d\n" % line)
    assert file.drain(20) and file.dropped == 0
    os.close(fd)
    assert (tmp_path / "log").read_text().split() == [str(line) for line in range(1000)]


def test_what_finds_no_room_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 200_000)
    reading, writing = os.pipe()
    file = BackgroundFile(writing)
    for _ in range(500):
        file.write(b"x" * 999 + b"\n")
    assert file.dropped == 300 and not file.drain(0.05)
    taken = 0
    while taken < 200_000:
        taken += len(os.read(reading, 2**16))
    assert file.drain(20)
    os.close(reading)
    file.write(b"to nobody\n")
    assert file.drain(20) and file.dropped == 301


def test_standard_error_is_what_it_was_unless_it_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 20)
    before, saved = sys.stderr, os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    try:
        with background_stderr() as file:
            print("heard", file=sys.stderr)
        assert sys.stderr is before
        assert os.read(reading, 100) == b"heard\n"
        monkeypatch.setattr(module, "FLUSH_SECONDS", 0.05)
        with background_stderr() as file:
            print("x" * 200_000, file=sys.stderr)
        assert sys.stderr is not before
        print("goes nowhere, and blocks nobody", file=sys.stderr)
        threading.Thread(target=lambda: [os.read(reading, 2**16) for _ in range(4)], daemon=True).start()
        assert file.drain(20)
    finally:
        sys.stderr = before
        os.dup2(saved, 2)
        for fd in (saved, reading, writing):
            os.close(fd)
