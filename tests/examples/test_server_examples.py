"""The examples around the server, run as they are on a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from support.tiny_chat import build_chat_model
from support.tiny_models import build_adapter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
async def test_the_application_and_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    model = build_chat_model(tmp_path / "model")
    for name in ("sql", "json", "pirate", "sentiment"):
        build_adapter(model, tmp_path / name, r=4)
    monkeypatch.setenv("MODEL", str(model))
    example = load("fastapi_app")
    monkeypatch.setattr(example, "ADAPTERS", tmp_path)
    async with example.app.router.lifespan_context(example.app):
        transport = httpx.ASGITransport(example.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.get("/ask", params={"question": "How many?"})
            assert set(answer.json()) == {"sql"}
            models = (await client.get("/llm/v1/models")).json()["data"]
            assert [card["id"] for card in models] == ["base", "sql", "json", "pirate", "sentiment"]
