"""A driver that steps a :class:`ModelRunner` by hand, without the engine's core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parallel_ranks import Ranks
from support.process_harness import preloaded_workers as preloaded_workers
from support.step_tokens import tokens_of
from torch import Tensor

from aioengine.adapters.store import AdapterStore
from aioengine.kernels import available_backends
from aioengine.model.build import build_runner
from aioengine.model.files.hf_config import read_spec
from aioengine.model.runner import ModelRunner
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch

BLOCK_SIZE = 4
NUM_BLOCKS = 300


def greedy(logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
    assert len(logits) == len(rows)
    return [Sampled(int(token)) for token in logits.argmax(-1)]


@dataclass
class Running:
    """A sequence under way: the first ``computed`` of ``tokens`` are in the KV cache."""

    tokens: list[int]
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    prompt_len: int = 0

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


class Driver:
    """Allocates block tables (scattered on purpose) and appends the sampled tokens."""

    def __init__(self, runner: ModelRunner, lora_dtype: torch.dtype) -> None:
        self.runner = runner
        self.lora_dtype = lora_dtype
        n = runner.kv_cache.num_blocks
        self.free = [(7 * i) % n for i in range(n)] if n % 7 else list(range(n))
        self.ranks = [0] * (runner.lora_slots.max_loras if runner.lora_slots else 0)

    def add(self, tokens: Sequence[int], slot: int = -1) -> Running:
        return Running(list(tokens), slot)

    def load(self, slot: int, folder: Path) -> None:
        """Reads a PEFT folder and puts it into a slot."""
        slots = self.runner.lora_slots
        assert slots is not None
        store = AdapterStore(
            slots.layout,
            dtype=self.lora_dtype,
            affine_dtype=self.runner.model.dtype,
            weights=self.runner.model.base_weight,
        )
        image = store.finish(store.begin(folder.name, str(folder)))
        slots.write(slot, image)
        self.ranks[slot] = image.rank

    def step(self, *work: tuple[Running, int]) -> None:
        """One step over (sequence, number of tokens to compute)."""
        block_size = self.runner.kv_cache.block_size
        ordered = sorted(work, key=lambda item: item[0].slot)
        rows = []
        for s, count in ordered:
            stop = s.computed + count
            while len(s.blocks) * block_size < stop:
                s.blocks.append(self.free.pop())
            rows.append(
                SequenceWork(
                    request_id=str(id(s)),
                    slot=s.slot,
                    tokens=s.tokens[s.computed : stop],
                    start=s.computed,
                    block_table=list(s.blocks),
                    sample=stop == len(s.tokens),
                    params=SamplingParams(),
                    seed=0,
                    history=list(s.tokens),
                    prompt_len=s.prompt_len,
                )
            )
        result = self.runner.execute(StepBatch(0, rows, self.ranks))
        for (s, count), row, tokens in zip(ordered, rows, tokens_of(result), strict=True):
            s.computed += count
            assert len(tokens) == row.sample
            s.tokens += tokens

    def run(self, *sequences: Running, new_tokens: int, chunk: int = 10**9) -> None:
        """Steps all sequences together, prompts in chunks, until each has ``new_tokens``."""
        while pending := [s for s in sequences if len(s.output) < new_tokens]:
            self.step(*((s, min(chunk, len(s.tokens) - s.computed)) for s in pending))


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
