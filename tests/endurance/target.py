"""A real server with a tiny model, and adapters made for it."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import transformers
from support.server_process import Serving, serving
from support.tiny_chat import build_chat_model
from support.tiny_models import build_adapter

ADAPTERS = tuple(f"adapter-{i}" for i in range(6))
FLAGS = ("--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "8", "--max-num-seqs", "16")


class Target:
    """A running server. ``http`` is a client of it; ``root`` has its adapters' folders."""

    def __init__(self, served: Serving, root: Path, http: httpx.AsyncClient) -> None:
        self.served = served
        self.root = root
        self.http = http

    async def complete(self, model: str = "tiny", **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": "Hello", "max_tokens": 8, "ignore_eos": True, **fields}
        return await self.http.post("/v1/completions", json=body)

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels."""
        total = 0.0
        for line in (await self.http.get("/metrics")).text.splitlines():
            found = re.match(rf"{name}(?:\{{([^}}]*)\}})? (\S+)$", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.served.process.pid)
        return [own, *own.children(recursive=True)]

    def errors(self) -> list[str]:
        """Lines of its log at level "error"."""
        return [line["message"] for line in self.served.lines if line.get("level") == "error"]


def build(folder: Path) -> tuple[Path, Path]:
    """Write the model, and a folder of adapters, one of which is broken."""
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    model, root = build_chat_model(folder / "tiny"), folder / "adapters"
    for seed, name in enumerate(ADAPTERS):
        build_adapter(model, root / name, seed=seed, r=8)
    broken = build_adapter(model, root / "broken", r=8) / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    return model, root


@contextlib.asynccontextmanager
async def served(folder: Path, *flags: str, **environment: str) -> AsyncIterator[Target]:
    """Run a server whose model and adapters are made in ``folder``."""
    model, root = build(folder)
    own = {"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")), **environment}
    async with (
        serving(
            model, *FLAGS, "--adapter-root", str(root), "--served-model-name", "tiny", *flags, **own
        ) as server,
        httpx.AsyncClient(
            base_url=server.url, timeout=30, trust_env=False, limits=httpx.Limits(max_connections=None)
        ) as http,
    ):
        yield Target(server, root, http)
