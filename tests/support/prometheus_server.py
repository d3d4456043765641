"""A real Prometheus with this project's rules."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx

RULES = Path(__file__).resolve().parents[2] / "metrics" / "alerts" / "aioengine.rules.yml"
BOUND = 60.0
"""Seconds that anything may take before the test fails; all of it takes a few when the machine is free."""
MISSING = shutil.which("prometheus") is None or shutil.which("promtool") is None

Sample = tuple[dict[str, str], float]


class Prometheus(NamedTuple):
    """A server's HTTP API."""

    url: str

    async def get(self, path: str, **parameters: str) -> Any:
        async with httpx.AsyncClient(trust_env=False, verify=False, timeout=BOUND) as http:
            answer = (await http.get(f"{self.url}/api/v1/{path}", params=parameters)).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def query(self, expr: str) -> list[Sample]:
        """An instant query's labels and values."""
        data = await self.get("query", query=expr)
        return [(result["metric"], float(result["value"][1])) for result in data["result"]]

    async def by(self, label: str, expr: str) -> dict[str, float]:
        return {labels[label]: value for labels, value in await self.query(expr)}

    async def wait(self, expr: str, reached: Callable[[list[Sample]], bool]) -> list[Sample]:
        async with asyncio.timeout(BOUND):
            while not reached(found := await self.query(expr)):
                await asyncio.sleep(0.05)
        return found


@contextlib.asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[Prometheus]:
    """A server with the rules of this project, on a free port, until the end of the block. ``target`` is
    HOST:PORT."""
    config: dict[str, Any] = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "aioengine", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    log = folder / "prometheus.log"
    with log.open("w", encoding="utf-8") as output:
        server = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            stdout=output,
            stderr=output,
        )
    try:
        async with asyncio.timeout(BOUND):
            listens = re.compile(r'msg="Listening on" address=(127\.0\.0\.1:\d+)')
            while (found := listens.search(log.read_text())) is None:
                assert server.returncode is None, log.read_text()
                await asyncio.sleep(0.05)
            server_url = f"http://{found[1]}"
            async with httpx.AsyncClient(trust_env=False, verify=False, timeout=BOUND) as http:
                while (await http.get(f"{server_url}/-/ready")).is_error:  # it listens before it can answer
                    await asyncio.sleep(0.05)
        yield Prometheus(server_url)
    finally:
        if server.returncode is None:
            server.terminate()
        try:
            await asyncio.wait_for(server.wait(), BOUND)
        except TimeoutError:
            server.kill()
            await server.wait()
