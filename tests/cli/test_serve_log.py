"""The log of ``aioengine serve``."""

from __future__ import annotations

import json
import logging
import os
import re
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.cli_programs import run_program, run_script

from aioengine.cli.serving.log import JsonFormatter, TextFormatter


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_warnings_name_flags(formatter: logging.Formatter) -> None:
    reason = "rank 64: raise LoRAConfig.max_lora_rank"
    record = logging.LogRecord("aioengine", logging.WARNING, "", 0, "not loaded: %s", (reason,), None)
    record.data = {"reason": reason, "times": 1}
    line = formatter.format(record)
    assert "LoRAConfig" not in line and "not loaded: rank 64: raise --max-lora-rank" in line
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["reason"] == "rank 64: raise --max-lora-rank"
    assert record.args == (reason,), "other handlers see what was said"


def test_what_requests_say_is_left_alone() -> None:
    record = logging.LogRecord("aioengine", logging.INFO, "", 0, "a: LoRAConfig.max_loras", (), None)
    assert TextFormatter().format(record).endswith("a: LoRAConfig.max_loras")


@given(st.text())
@example("a\n2026-12-01 05:00:00,000 INFO    POST /v1/FORGED 200 tenant=victim")
def test_what_clients_say_cannot_look_like_a_line_of_the_log(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        failure = sys.exc_info()
    record = logging.LogRecord("aioengine", logging.WARNING, "", 0, "unknown field %s", (text,), failure)
    first, *others = TextFormatter().format(record).splitlines()
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]", first)
    assert all(line.startswith("  ") for line in others)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--grace-seconds", "-1"], "--grace-seconds=-1"),
        (["--model", "/nowhere/model"], "/nowhere/model"),
    ],
)
@pytest.mark.slow
def test_all_of_a_json_log_is_json(flags: list[str], says: str) -> None:
    """What ends the server before it serves, and warnings of the interpreter, are lines of it as well."""
    done = run_program(
        "serve", "--log-format", "json", "--port", "0", *flags, env=os.environ | {"AIOENGINE_PRT": "1"}
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 2 and lines[-1]["level"] == "error" and says in lines[-1]["message"]
    assert any("AIOENGINE_PRT" in line["message"] for line in lines)


def test_warnings_and_threads_that_fail_are_lines_of_the_log() -> None:
    script = """
import threading, warnings
from aioengine.cli.serving.log import configure_logging
configure_logging("json", "info")
warnings.warn("of a library")
thread = threading.Thread(target=lambda: 1 / 0, name="reader")
thread.start()
thread.join()
"""
    warned, failed = [json.loads(line) for line in run_script(script).stderr.splitlines()]
    assert "of a library" in warned["message"] and warned["level"] == "warning"
    assert failed["message"].startswith("thread reader failed: ZeroDivisionError") and failed["exception"]
