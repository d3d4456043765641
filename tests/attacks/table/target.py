"""A real server under attack, and what attackers can do with it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import httpx
from attacks.table import watched
from attacks.table.watched import Held
from support.server_process import Serving, serving

MODEL = "smollm2-135m"
EXAMPLE = Path(__file__).parents[3] / "examples" / "adapters" / "sql"
FLAGS = {
    "--served-model-name": MODEL,
    "--max-model-len": "8192",
    "--kv-cache-memory": "1GiB",
    "--max-body-bytes": "8388608",  # so that bodies of all sizes get past that bound
    "--max-upload-bytes": "8388608",
    "--default-max-tokens": "200",
    "--max-loras": "4",
    "--max-lora-rank": "64",
    "--dtype": "auto",
}
NAMES = 10_000
"""Adapters that the server knows, and that nobody uses."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TYPE = {"content-type": "application/json"}


def key(who: str) -> dict[str, str]:
    return {"authorization": f"Bearer key-of-{who}", **TYPE}


class Target(NamedTuple):
    """A server under attack."""

    served: Serving
    root: Path
    """Folder of its adapters."""
    example: Path
    """An adapter of its model."""
    http: httpx.AsyncClient
    held: Held

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body})
        return await self.http.post(path, content=content, **options)

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, **fields})

    async def load(self, name: str) -> str:
        """Use the adapter of that folder; returns the status."""
        answer = await self.ask(model=name)
        return f"{answer.status_code}, {len(answer.content):,} bytes"

    def adapter(self, name: str, **config: Any) -> Path:
        folder = Path(shutil.copytree(self.example, self.root / name))
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(settings | config))
        return folder


@contextlib.asynccontextmanager
async def attacked(
    *flags: str,
    template: str | None = None,
    model: Path | str = MODEL,
    example: Path = EXAMPLE,
    changed: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Target]:
    """Serve the model with ``flags`` added and some ``changed``, a folder for adapters, thousands of names,
    and possibly another chat template."""
    words = [word for pair in {**FLAGS, **changed}.items() for word in pair]
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.NamedTemporaryFile() as file,
        tempfile.NamedTemporaryFile("w", suffix=".toml") as config,
    ):
        root, held = Path(folder), Held(Path(file.name))
        config.write("\n".join(["[adapters]", *(f'name-{i} = "{example}"' for i in range(NAMES))]))
        config.flush()
        if template is not None:
            given = root / "template.jinja"
            given.write_text(template)
            flags = (*flags, "--chat-template", str(given))
        words += ["--adapter-root", folder, "--config", config.name, *flags]
        async with (
            serving(model, *words, module=watched.__name__, **{watched.FILE: file.name}) as served,
            httpx.AsyncClient(
                base_url=served.url,
                headers=key("a"),
                timeout=60,
                trust_env=False,
                limits=httpx.Limits(max_connections=None),
            ) as http,
        ):
            yield Target(served, root, example, http, held)


def filled(before: str, part: str, after: str, size: int = 8_000_000) -> bytes:
    """Return JSON of ``size`` bytes: many times ``part``, with commas between."""
    return f"{before}{','.join([part] * (size // (len(part) + 1)))}{after}".encode()


def statuses(answers: Sequence[httpx.Response | BaseException | str]) -> str:
    """Return how often each status was answered."""
    seen = [a if isinstance(a, str) else getattr(a, "status_code", type(a).__name__) for a in answers]
    assert not {500, "500"} & {*seen}, "a fault of the server"
    return ", ".join(f"{s} ({seen.count(s)}x)" if len(seen) > 1 else str(s) for s in dict.fromkeys(seen))
