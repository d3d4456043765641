"""Requests made up from the API's own description: none is answered with a 5xx, and answers conform."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from support.engine_fixtures import Tiny
from support.server_fixtures import MODEL, Serve

EXAMPLES = os.environ.get("AIOENGINE_API_EXAMPLES", "20")
"""Made-up requests for each operation, beside the systematic ones."""
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
async def test_no_request_upsets_the_server(serve: Serve, tiny_text: Tiny, tmp_path: Path) -> None:
    """Deterministic, and over within a minute. Models are named that are there: or else every request with
    a good body would end at that."""
    shutil.copytree(tiny_text.adapters["a"], tmp_path / "root" / "b")
    root = str(tmp_path / "root")
    async with serve(adapter_root=root, max_model_len=256, settings={"default_max_tokens": 4}) as served:
        schema = (await served.http.get("/docs/openapi.json")).json()
        for name in ("ChatRequest", "CompletionRequest"):
            properties = schema["components"]["schemas"][name]["properties"]
            properties["model"] = {"enum": [MODEL, "a", "b", "nobody"]}
            properties["n"] = {"enum": [None, 1, 2]}
            properties["max_tokens"] = {"enum": [None, 1, 4]}
        chat = schema["components"]["schemas"]["ChatRequest"]["properties"]
        chat["max_completion_tokens"] = {"enum": [None, 1, 4]}
        document = tmp_path / "openapi.json"
        document.write_text(json.dumps(schema))
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", served.url]
        command += ["--checks", CHECKS, "--max-examples", EXAMPLES, "--generation-deterministic"]
        command += ["--phases", "coverage,fuzzing", "--suppress-health-check", "all", "--no-color"]
        command += ["--request-timeout", "20"]
        process = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), 300)
        assert process.returncode == 0, output.decode()[-6000:]
        assert served.app.active == 0
        served.engine.check_invariants()
        assert (await served.http.get("/ready")).status_code == 200
