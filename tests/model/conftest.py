from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.driver import Driver
from support.parallel_ranks import Ranks
from support.process_harness import preloaded_workers as preloaded_workers
from torch import Tensor

from aioengine.kernels import available_backends
from aioengine.model.build import build_runner
from aioengine.model.files.hf_config import read_spec
from aioengine.step import Sampled, SequenceWork

BLOCK_SIZE = 4
NUM_BLOCKS = 300


def greedy(logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
    assert len(logits) == len(rows)
    return [Sampled(int(token)) for token in logits.argmax(-1)]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def cpu_library() -> None:
    if "cpu" not in available_backends("cpu"):
        pytest.skip("the CPU library cannot be built here")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def make_driver() -> Callable[..., Driver]:
    def make(model_dir: Path, **overrides: Any) -> Driver:
        arguments: dict[str, Any] = {
            "dtype": torch.float32,
            "device": "cpu",
            "num_blocks": NUM_BLOCKS,
            "block_size": BLOCK_SIZE,
            "sample": greedy,
            **overrides,
        }
        runner = build_runner(read_spec(model_dir), model_dir, **arguments)
        return Driver(runner, arguments.get("lora_dtype") or arguments["dtype"])

    return make
