"""An engine behind a real server on a free port, and the official client for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import openai
import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.waiting import until as until

from aioengine import AsyncEngine
from aioengine.schedulers import load_policy
from aioengine.server import ServerApp, ServerSettings, create_app
from aioengine.server.run import ListenSettings, listening

MODEL = "tiny"


class Served:
    """``client`` is OpenAI's, ``http`` plain httpx; neither retries. Reading the certificates takes 23 ms: so
    the first is made when a test needs it, and the second verifies none."""

    def __init__(self, engine: AsyncEngine, app: ServerApp, url: str, key: str) -> None:
        self.engine = engine
        self.app = app
        self.url = url
        self._key = key
        headers = {"authorization": f"Bearer {key}"}
        self.http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=60.0, trust_env=False, verify=False
        )

    @functools.cached_property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self._key, max_retries=0)

    async def close(self) -> None:
        if "client" in vars(self):
            await self.client.close()
        await self.http.aclose()


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@contextlib.asynccontextmanager
async def served_by(
    engine: AsyncEngine,
    *,
    settings: dict[str, Any] | None = None,
    listen: dict[str, Any] | None = None,
    key: str = "none",
) -> AsyncIterator[Served]:
    """``engine`` behind a server, its model called "tiny"."""
    app = create_app(engine, ServerSettings(**{"served_model_names": [MODEL], **(settings or {})}))
    async with listening(app, ListenSettings(**{"port": 0, **(listen or {})})) as url:
        served = Served(engine, app, url, key)
        try:
            yield served
        finally:
            await served.close()


@pytest.fixture
def serve(tiny_text: Tiny, make_engine: MakeEngine) -> Serve:
    """``async with serve(settings=..., key=..., listen=..., **engine fields) as served``: the tiny text
    model with its adapter "a" registered, under the policy that the command takes."""

    @contextlib.asynccontextmanager
    async def serve_(
        *,
        settings: dict[str, Any] | None = None,
        listen: dict[str, Any] | None = None,
        key: str = "none",
        **fields: Any,
    ) -> AsyncIterator[Served]:
        async with make_engine(tiny_text, **{"policy": load_policy("fair"), **fields}) as engine:
            engine.register_adapter("a", tiny_text.adapters["a"])
            async with served_by(engine, settings=settings, listen=listen, key=key) as served:
                yield served

    return serve_
