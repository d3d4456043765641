"""Prompts, chats and tokens far beyond what fits: nobody else waits for them to be refused, or worked on."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
from support.bystander import bystander, memory
from support.engine_fixtures import Tiny
from support.server_process import serving

pytestmark = pytest.mark.slow


def requests(length: int) -> list[tuple[str, dict[str, Any]]]:
    """Path and body; ``length`` is that of their texts, more or less."""
    made: list[tuple[str, dict[str, Any]]] = []
    for text in ("a " * (length // 2), " " * length, "x" * length, "\U0001f600" * (length // 12)):
        made.append(("/v1/completions", {"prompt": text}))
        made.append(("/v1/completions", {"prompt": [text[:1000]] * 100}))
        made.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}))
        made.append(("/tokenize", {"prompt": text}))
    message = {"role": "user", "content": "x" * (length // 2500)}
    made.append(("/v1/chat/completions", {"messages": [message] * 2048}))
    made.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 30_000}))
    parts = [{"type": "text", "text": ""}] * 30_000
    made.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}))
    made.append(("/v1/completions", {"prompt": [65] * (length // 4)}))
    made.append(("/v1/completions", {"prompt": [[65] * (length // 400)] * 100}))
    made.append(("/detokenize", {"tokens": [65] * (length // 4)}))
    return made


@pytest.mark.parametrize("bounded", [True, False])
async def test_long_texts_hold_up_nobody(bounded: bool, tiny_text: Tiny, tmp_path: Path) -> None:
    """Not ``bounded``: the tokenizer may drop any length of white space, so every text is tokenized."""
    model = tiny_text.model
    if not bounded:
        model = Path(shutil.copytree(model, tmp_path / "model"))
        tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        tokenizer.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True)])
        tokenizer.save(str(model / "tokenizer.json"))
    async with (
        serving(model, "--served-model-name", "tiny", "--max-body-bytes", "16000000") as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=120) as http,
    ):
        bodies = [
            (path, json.dumps({"model": "tiny", "max_tokens": 1, **body} if path[1] == "v" else body))
            for path, body in requests(2_000_000 if bounded else 400_000)
        ]
        headers = {"content-type": "application/json"}
        async with bystander(server.url) as seen:
            for path, body in bodies:
                answer = await http.post(path, content=body, headers=headers)
                assert answer.status_code == 400, answer.text[:300]
            await asyncio.gather(*(http.post(p, content=body, headers=headers) for p, body in bodies[:12]))
        assert memory(server.process.pid, "VmHWM") < 2**30
    seen.check()
