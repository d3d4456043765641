"""The files of a small run, made by hand, so that every figure of it can be worked out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from aioengine.lab.runs.rows import FILES, Move, RequestRecord, Sample, SlotSpan


def request(name: str, adapter: str | None, arrival: float, **fields: Any) -> RequestRecord:
    """Finished, 10 prompt and 5 output tokens, admitted after 1 s, first token after 2 s, whole after 4 s."""
    values: dict[str, Any] = {
        "tenant": None,
        "prompt_tokens": 10,
        "output_tokens": 5,
        "admitted": arrival + 1.0,
        "first_token": arrival + 2.0,
        "ended": arrival + 4.0,
        "reason": "length",
        "found": None if adapter is None else "slot",
        "cached_tokens": 0,
        "preemptions": 0,
        "worst_gap": 0.5,
        "deadline": None,
    }
    return RequestRecord(request_id=name, adapter=adapter, arrival=arrival, **{**values, **fields})


def sample(time: float, service: dict[str, int], **fields: Any) -> Sample:
    values: dict[str, Any] = {
        "running": 1,
        "waiting": 2,
        "steps": 10,
        "step_seconds": 0.5,
        "prefill_tokens": 20,
        "decode_tokens": 10,
        "adapters": 15,
        "kv_used": 0.25,
        "slots_ready": 1,
        "cpu_adapters": 2,
    }
    return Sample(time=time, service=json.dumps(service), **{**values, **fields})


REQUESTS = [
    request("r0", "a", 0.0, deadline=5.0),
    request("r1", "a", 1.0, found="cpu", deadline=4.5, preemptions=2),
    request("r2", "<script>", 2.0, found="disk", ended=10.0, output_tokens=9),
    request("r3", None, 3.0, output_tokens=1, first_token=7.0, ended=7.0),
    request("r4", "a", 4.0, ended=9.0, reason="error", error="DeadlineExceeded", deadline=9.0)
    ._replace(admitted=None, first_token=None, output_tokens=0),
    request("r5", "a", 5.0, ended=5.0, reason="refused", error="EngineOverloaded", found=None)
    ._replace(admitted=None, first_token=None, output_tokens=0),
]  # fmt: skip
SPANS = [SlotSpan(0, "a", 0.0, 0.5, 8.0, 12), SlotSpan(1, "<script>", 2.0, 3.0, 10.0, 8)]
MOVES = [
    Move("disk", "a", 0.0, 0.25, 1000),
    Move("slot", "a", 0.25, 0.5, 1000),
    Move("disk", "idle", 1.0, 2.0, 4000),
    Move("disk", "<script>", 2.0, 3.0, 0, "AdapterInvalid"),
]
SAMPLES = [sample(5.0, {"a": 30}), sample(10.0, {"a": 10, "<script>": 20, "(base)": 11})]


def write_files(
    folder: Path,
    requests: list[RequestRecord] = REQUESTS,
    spans: list[SlotSpan] = SPANS,
    moves: list[Move] = MOVES,
    samples: list[Sample] = SAMPLES,
    slots: int = 2,
) -> Path:
    """What a run leaves in ``folder``, less its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    for (name, record), rows in zip(FILES.items(), (requests, spans, moves, samples), strict=True):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(record._fields)
            writer.writerows(rows)
    experiment = {"policy": "<b>fcfs", "preset": "tiny", "slots": slots, "workload": {"limit": 6}}
    described = {"aioengine": "1", "python": "3", "experiment": experiment}
    (folder / "experiment.json").write_text(json.dumps(described))
    return folder
