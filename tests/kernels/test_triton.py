"""The Triton backend without a GPU: its operations in the interpreter, and what is plain Python about it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.selection import mostly_slow

from aioengine.kernels import LoRABatch, available_backends, get_backend
from aioengine.kernels.triton.plan import TilePlan, cut, padded
from aioengine.kernels.triton.table import expand_config, shrink_config

ROOT = Path(__file__).resolve().parents[2]
OPS = [f"tests/kernels/test_{name}.py" for name in ("triton_ops", "triton_order")]
MORE_OPS = [
    f"tests/{folder}/{name}"
    for folder, name in (
        ("kernels", "test_lora_ops.py"),
        ("kernels", "test_triton_attention.py"),
        ("kernels", "test_triton_far.py"),
        ("kernels", "test_layer_ops.py"),
        ("kernels", "test_expert_ops.py"),
        ("kernels", "test_played_steps.py"),
        ("kernels", "test_triton_memory.py"),
        ("kernels", "test_triton_blocks.py"),
        ("kernels", "test_float8_cache.py"),
        ("model", "test_families.py"),
    )
]


def run(*arguments: str, **environment: str) -> str:
    """What Python prints, in a process with these variables."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd=ROOT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("files", mostly_slow([OPS, MORE_OPS], OPS), ids=["lora", "others"])
def test_operations_in_the_interpreter(files: list[str]) -> None:
    """Many in one process, since half of the time of each would be its imports."""
    pytest.importorskip("triton")
    printed = run("-m", "pytest", "-p", "no:cacheprovider", *files, TRITON_INTERPRET="1")
    assert "skipped" not in printed


def test_the_backend_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("AIOENGINE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert available_backends("cuda") == ["triton", "torch"]
    assert get_backend("cuda").name == "triton"
    assert get_backend("cuda", "torch").name == "torch"
    assert "triton" not in available_backends("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert get_backend("cpu").name != "triton", "the interpreter must be asked for by name"
    assert get_backend("cpu", "triton").name == "triton"


@pytest.mark.slow
def test_plain_torch_serves_a_gpu_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from aioengine.kernels import get_backend\n"
        "print(get_backend('cuda').name)"
    )
    assert run("-c", script, AIOENGINE_KERNELS="") == "torch\n"


def test_grids_come_in_few_sizes() -> None:
    sizes = {padded(count) for count in range(1, 1025)}
    assert len(sizes) == 8 + 4 * 7
    assert all(count <= padded(count) <= 1.25 * count for count in range(1, 1025))


def test_tiles_of_a_batch() -> None:
    batch = LoRABatch([-1, 0, 2], [3, 1, 150], [8, 0, 4], slot_affine=[True, False, False])
    plan = batch.derive(TilePlan)
    assert plan is batch.derive(TilePlan)
    assert plan.longest == 150
    assert cut(batch.segments, 64) == [(0, 3, 1, 8), (2, 4, 64, 4), (2, 68, 64, 4), (2, 132, 22, 4)]
    assert plan.tiles(64).tolist() == [list(tile) for tile in cut(batch.segments, 64)]
    assert len(plan.tiles(16)) == 12 and plan.tiles(16)[11].tolist() == [0, 0, 0, 0]
    assert plan.affine_tiles(16).tolist() == [[0, 3, 1, 8]]
    assert LoRABatch([-1], [3], []).derive(TilePlan).longest == 0


def test_prompts_are_summed_as_decoding_is() -> None:
    """What the order of sums depends on is decoding's."""
    for rank, bits in ((64, 16), (512, 32), (16, 16), (8, 32)):
        prompt, decode = (shrink_config(bits, rank, 4096, longest) for longest in (17, 16))
        assert (prompt.block_k, prompt.split_k) == (decode.block_k, decode.split_k)
        assert expand_config(bits, rank, 4096, 17).block_r == expand_config(bits, rank, 4096, 16).block_r
