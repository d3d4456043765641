"""Made-up requests of every endpoint, and uploads, sent badly."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support import made_requests
from support.made_uploads import upload


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
