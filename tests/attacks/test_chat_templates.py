"""Chats that give their template as much to do as they can: who streams beside them notices nothing."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import httpx
import pytest
from support.bystander import bystander, memory
from support.engine_fixtures import Tiny
from support.selection import mostly_slow
from support.server_process import serving

TEMPLATES = {
    "messages of messages": "{% for m in messages %}{% for n in messages %}{% if n.role == m.content %}"
    "{% endif %}{% endfor %}{% endfor %}",
    "tools of messages": "{% for m in messages %}{% for t in tools %}{{ t | tojson }}"
    "{% endfor %}{% endfor %}",
    "kwargs": "{% for d in documents %}{% for m in messages %}{% if d in m.content %}"
    "{% endif %}{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("template", mostly_slow(TEMPLATES, next(iter(TEMPLATES))))
async def test_no_template_holds_others_up(template: str, tiny_text: Tiny, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_text.model, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(TEMPLATES[template])
    parameters = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(30)}}
    function = {"description": "d" * 500, "parameters": parameters}
    chat = {
        "model": "tiny",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "Hello " * 10}] * 2048,
        "tools": [{"type": "function", "function": {"name": f"f{i}", **function}} for i in range(128)],
        "chat_template_kwargs": {"documents": ["x" * 10] * 30_000},
    }
    async with (
        serving(model, "--served-model-name", "tiny", "--max-body-bytes", "4000000") as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=120) as http,
    ):
        before = memory(server.process.pid, "VmHWM")
        async with bystander(server.url) as seen:
            answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=chat) for _ in range(2)))
        grown = memory(server.process.pid, "VmHWM") - before
    for answer in answers:
        assert answer.status_code == 400 and "chat template" in answer.text, answer.text[:300]
    assert grown < 500 * 2**20
    seen.check()
