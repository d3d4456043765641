"""Load generators, each run as a command for a few requests.

``AIOENGINE_MODEL_FOLDER`` has the tokenizer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ADAPTER, MODEL, URL, check, main

FOLDER = os.environ["AIOENGINE_MODEL_FOLDER"]
BIN = Path(sys.executable).parent


def run(*command: str, cwd: str) -> None:
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-300:]


@check("guidellm", "a run with streaming, as it is by default")
def guidellm() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(
            *(str(BIN / "guidellm"), "run", "--backend", f"kind=openai_http,target={URL},model={MODEL}"),
            *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
            *("--tokenizer", f"kind=hf_auto,model={FOLDER}"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
            *("--output", f"kind=json,path={folder}/found.json"),
            cwd=folder,
        )
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    [benchmark] = found["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == 6, benchmark["requests"]["errored"]


@check("aiperf", "chats with an adapter, of lengths that are fixed")
def aiperf() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(
            *(str(BIN / "aiperf"), "profile", "--model", ADAPTER, "--url", URL, "--endpoint-type", "chat"),
            *("--streaming", "--tokenizer", FOLDER, "--request-count", "4", "--concurrency", "2"),
            *("--extra-inputs", "min_tokens:8", "--extra-inputs", "ignore_eos:true"),
            *("--isl", "32", "--osl", "8", "--use-server-token-count"),
            *("--ui-type", "none", "--artifact-dir", folder),
            cwd=folder,
        )
        [file] = Path(folder).rglob("profile_export_aiperf.json")
        found: dict[str, Any] = json.loads(file.read_text())
    assert found["request_count"]["avg"] == 4, found
    assert found["output_sequence_length"]["min"] == 8, found


if __name__ == "__main__":
    main()
