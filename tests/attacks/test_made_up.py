"""Made-up requests of every endpoint, and uploads, sent badly."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from support import made_requests
from support.bystander import bystander
from support.engine_fixtures import Tiny
from support.made_uploads import upload
from support.server_process import serving

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
async def test_each_is_answered_or_refused_with_a_reason(tiny_text: Tiny) -> None:
    flags = ["--served-model-name", "tiny", "--max-upload-bytes", "1000000", "--max-body-bytes", "4000000"]
    flags += ["--adapter-root", str(tiny_text.adapters["a"].parent), "--default-max-tokens", "50"]
    async with serving(tiny_text.model, *flags) as served, bystander(served.url) as seen:
        words = ("-m", "support.made_up", served.url, "tiny", "--count", "100", "--seconds", "600")
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdout=asyncio.subprocess.PIPE, cwd=TESTS
        )
        try:
            report = json.loads((await process.communicate())[0])
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert not report["wrong"], report["wrong"]
    assert {"200", "400"} <= set(report["statuses"])
    assert not seen.errors and seen.streams > 0


def test_a_request_depends_on_its_seed_alone() -> None:
    for seed in range(20):
        assert upload(random.Random(seed), "tiny") == upload(random.Random(seed), "tiny")


def test_a_body_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a schema has lists of long lists, too: they would take all memory there is."""
    monkeypatch.setattr(made_requests, "LONGEST", 10_000)
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(4):
        schema = {"type": "array", "minItems": 200, "maxItems": 2048, "items": schema}
    body = {"content": {"application/json": {"schema": schema}}}
    document = {"components": {"schemas": {}}, "paths": {"/x": {"post": {"requestBody": body}}}}
    maker = made_requests.Maker(document, "tiny")
    sizes = [len(maker.request(random.Random(seed)).body.strip()) for seed in range(200)]
    assert 5_000 < max(sizes) < 30_000
