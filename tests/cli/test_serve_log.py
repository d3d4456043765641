"""The log of ``aioengine serve``."""

from __future__ import annotations

import json
import logging

import pytest

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
