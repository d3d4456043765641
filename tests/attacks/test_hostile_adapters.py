"""Folders that whoever may put them below the adapter root has made to harm others."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.bystander import bystander, memory
from support.engine_fixtures import Tiny
from support.peft_files import CONFIG, WEIGHTS, edit_config
from support.server_process import serving

pytestmark = pytest.mark.slow

BIN = "adapter_model.bin"


def slow_pattern(folder: Path) -> None:
    edit_config(folder, target_modules="(.*.*)*(_|o)*proj.*x")


def slow_rank_pattern(folder: Path) -> None:
    """Matches nothing, so it is an adapter as any other, once that has been found out."""
    edit_config(folder, rank_pattern={"((a|q|_|p|r|o|j)+)+$x": 4}, alpha_pattern={"(.+)+(.+)+y": 4})


def many_dimensions(folder: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [2**40] * 40_000, "data_offsets": [0, 0]}}
    raw = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw)


def truncated(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def sparse(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 8 << 30)


def pipe_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def pipe_for_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


def large_config(folder: Path) -> None:
    edit_config(folder, target_modules=[f"layer{i}.q_proj" for i in range(200_000)])


def large_rank(folder: Path) -> None:
    edit_config(folder, r=4096)


HOSTILE: tuple[Callable[[Path], None], ...] = (
    slow_pattern,
    slow_rank_pattern,
    many_dimensions,
    truncated,
    sparse,
    pipe_for_weights,
    pipe_for_config,
    large_config,
    large_rank,
)


@pytest.fixture
def root(tiny_text: Tiny, tmp_path: Path) -> Path:
    """ "good", and a folder for each of the hostile ones."""
    shutil.copytree(tiny_text.adapters["a"], tmp_path / "good")
    for make in HOSTILE:
        make(Path(shutil.copytree(tiny_text.adapters["a"], tmp_path / make.__name__)))
    return tmp_path


async def test_hostile_folders_harm_nobody(tiny_text: Tiny, root: Path) -> None:
    flags = ["--served-model-name", "tiny", "--adapter-root", str(root)]
    async with (
        serving(tiny_text.model, *flags) as server,
        httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as client,
    ):

        async def use(name: str) -> httpx.Response:
            body = {"model": name, "prompt": "Hello", "max_tokens": 2}
            return await client.post("/v1/completions", json=body)

        async def load(name: str) -> httpx.Response:
            body = {"lora_name": f"{name}-loaded", "lora_path": name}
            return await client.post("/v1/load_lora_adapter", json=body)

        assert (await use("good")).status_code == 200  # from now on its header is known
        names = [make.__name__ for make in HOSTILE]
        answers: dict[str, list[httpx.Response]] = {name: [] for name in names}
        async with bystander(server.url) as seen:
            before = memory(server.process.pid)
            began = time.perf_counter()
            for name in names:
                answers[name] += await use(name), await load(name), await use(f"{name}-loaded")
            alone = time.perf_counter() - began
            await asyncio.gather(*(use(name) for name in names for _ in range(4)))
            grown = memory(server.process.pid, "VmHWM") - before
        assert (await use("good")).status_code == 200
        assert {answer.status_code for answer in answers.pop("slow_rank_pattern")} == {200}
        for name, found in answers.items():
            for answer in found:
                assert answer.status_code in (400, 404, 503), (name, answer.text[:300])
                assert len(answer.content) < 4096
                assert "unexpected" not in answer.text
        assert "raise --max-lora-rank" in answers["large_rank"][0].json()["error"]["message"]
        assert "LoRAConfig" not in str([answer.text for found in answers.values() for answer in found])
        assert grown < 300 << 20
        assert alone < 10
        logged = [line["message"] for line in server.lines if line["level"] == "warning"]
        for name in answers:
            if answers[name][0].status_code != 404:  # what is found and is bad
                assert 1 <= sum(f"'{name}'" in text for text in logged) <= 2
    seen.check()
