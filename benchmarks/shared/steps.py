"""Steps of a model without an engine around them, for benchmarks."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from aioengine.adapters.store import AdapterStore
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import ModelImpl
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch

BLOCK = 16
GREEDY = SamplingParams()


class Steps:
    """A model with random adapters in ``slots`` slots, and a KV cache of ``kv_tokens``.

    ``one_place``: all slots' adapters lie where the first one's does, so that memory is read once for all.
    """

    def __init__(
        self,
        model: str,
        *,
        kv_tokens: int,
        slots: int = 0,
        rank: int = 16,
        quantization: str = "none",
        int8_cache: bool = False,
        lora_dtype: torch.dtype = torch.bfloat16,
        model_impl: ModelImpl = "auto",
        one_place: bool = False,
    ) -> None:
        self._path = path = resolve_model(model)
        self.spec = read_spec(path, model_impl)
        self.rank = rank
        self.runner = ModelRunner(
            self.spec,
            path,
            dtype=torch.bfloat16,
            device="cpu",
            num_blocks=-(-kv_tokens // BLOCK) + 64,
            block_size=BLOCK,
            max_loras=slots,
            max_lora_rank=rank,
            lora_dtype=lora_dtype,
            quantization=quantization,
            int8_cache=int8_cache,
        )
        for cache in (*self.runner.kv_cache.k, *self.runner.kv_cache.v):
            cache.fill_(1 if int8_cache else 0.5)  # memory that was never written would be read from one page
        self._write_adapters(slots)
        if one_place and self.runner.lora_slots is not None:
            table = self.runner.lora_slots.memory.table
            table[:] = table[0].clone()

    def _write_adapters(self, count: int) -> None:
        slots = self.runner.lora_slots
        if slots is None:
            return
        store = AdapterStore(
            self.spec,
            max_rank=self.rank,
            target_modules=self.spec.targets(None),
            dtype=slots.dtype,
            affine_dtype=torch.bfloat16,
            weights=self.runner.decoder.base_weight,
        )
        with tempfile.TemporaryDirectory() as folder:
            path = write_random_adapter(Path(folder) / "adapter", read_spec(self._path), self.rank, seed=0)
            image = store.read("adapter", str(path))
            for slot in range(count):
                slots.write(slot, image)

    def batch(self, sequences: int, tokens: int, start: int, adapters: int = 0) -> StepBatch:
        """Build a step of ``sequences`` that compute ``tokens`` each from position ``start`` on; sequence i
        uses slot i % ``adapters``, or no adapter if there are none. Their blocks lie in random order."""
        width = -(-(start + tokens) // BLOCK)
        blocks = list(range(sequences * width))
        random.Random(0).shuffle(blocks)
        rng = random.Random(1)
        work = []
        for i, slot in enumerate(sorted(j % adapters if adapters else -1 for j in range(sequences))):
            ids = [rng.randrange(100, self.spec.vocab_size - 100) for _ in range(tokens)]
            table = blocks[i * width : (i + 1) * width]
            work.append(SequenceWork(str(i), slot, ids, start, table, True, GREEDY, 0, ids, tokens))
        slots = 0 if self.runner.lora_slots is None else self.runner.lora_slots.max_loras
        return StepBatch(0, work, [self.rank] * slots)

    def decode(self, sequences: int, context: int, adapters: int = 0) -> Callable[[], object]:
        """Build a decode step of ``sequences`` after ``context`` tokens each."""
        batch = self.batch(sequences, 1, context, adapters)
        return lambda: self.runner.execute(batch)

    def prefill(self, sequences: int, tokens: int, adapters: int = 0) -> Callable[[], object]:
        """Build a step that computes whole prompts of ``tokens``."""
        batch = self.batch(sequences, tokens, 0, adapters)
        return lambda: self.runner.execute(batch)
