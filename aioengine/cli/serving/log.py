"""Log of ``aioengine serve``: lines for people, or JSON for programs.

Warnings and errors name flags where the engine names fields of its configuration.
"""

from __future__ import annotations

import logging
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec

from aioengine.cli.flags import in_flags

_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_ESCAPED = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS if chr(code) != "\t"}


class TextFormatter(logging.Formatter):
    """Time, level and message. A message is one line, and a traceback is indented, because both may have text
    of clients, who must not be able to write what looks like a line of the log."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # this name is given by the library
        record.message = _worded(record, record.message).translate(_ESCAPED)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        lines = super().formatException(ei).split("\n")
        return "\n".join("  " + line.translate(_ESCAPED) for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the request's fields for a record of a
    request.

    Other records may have fields in an attribute ``data``; in lines for people the message has them.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        data = getattr(record, "data", {})
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": "request" if fields else _worded(record, record.getMessage()),
            **fields,
            **{k: _worded(record, v) if isinstance(v, str) else v for k, v in data.items()},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


def _worded(record: logging.LogRecord, text: str) -> str:
    return in_flags(text) if record.levelno >= logging.WARNING else text


def configure_logging(form: str, level: str, handler: logging.Handler | None = None) -> None:
    """Configure logging for the whole process; only the program does this, never the library. ``form`` is
    "text" or "json"; without a handler lines go to standard error."""
    handler = logging.StreamHandler(sys.stderr) if handler is None else handler
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    threading.excepthook = _log_failure
    for chatty in ("uvicorn", "httpx", "httpcore", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def _log_failure(failure: threading.ExceptHookArgs) -> None:
    name = "that has ended" if failure.thread is None else failure.thread.name
    found = failure.exc_value
    logging.getLogger("aioengine").error("thread %s failed: %r", name, found, exc_info=found)


def print_line(text: str, level: int) -> None:
    """Print a line beside a command's output: for people or, where the log is JSON, as a line of it."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        text = JsonFormatter().format(logging.LogRecord("aioengine", level, "", 0, text, None, None))
    else:
        text = f"aioengine: {text}"
    with suppress(OSError):  # nobody reads it
        print(text, file=sys.stderr)
