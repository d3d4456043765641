"""Several ranks, half and fully sharded."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path

from aioengine import LoRAConfig
from aioengine.model.files.resolve import read_spec
from benchmarks.engine.models import rate
from benchmarks.runner import Calls
from benchmarks.shared.engines import configuration, random_prompts, started, write_adapters
from benchmarks.shared.shapes import SMALL, random_model

RANKS = (8, 64, 256)
ADAPTERS = 4


async def parallel(
    *, ranks: tuple[int, ...] = RANKS, layers: int = 8, rounds: int = 5
) -> AsyncGenerator[Calls, None]:
    """One and two ranks on this machine, half and fully sharded: decoding, and a prompt of 1,024 tokens.

    Ranks exchange through sockets here, so this says little of GPUs with NVLink.
    """
    modes = {"1 rank": (1, False), "2 ranks, half": (2, False), "2 ranks, fully sharded": (2, True)}
    with tempfile.TemporaryDirectory() as root:
        folder = random_model(Path(root), "small", layers)
        for rank in ranks:
            adapters = write_adapters(Path(root) / str(rank), read_spec(folder), ADAPTERS, rank)
            configs = {
                name: configuration(
                    str(folder),
                    executor="process",
                    tensor_parallel_size=size,
                    max_model_len=1100,
                    lora=LoRAConfig(max_loras=ADAPTERS, max_lora_rank=rank, fully_sharded_loras=full),
                )
                for name, (size, full) in modes.items()
            }
            async with started(configs, adapters) as engines:
                for count, prompt, output in ((1, 8, 64), (16, 8, 64), (1, 1024, 1)):
                    prompts = random_prompts(SMALL.vocab_size, count, prompt)
                    calls = {
                        name: partial(rate, engine, prompts, output, list(adapters))
                        for name, engine in engines.items()
                    }
                    yield Calls(
                        f"Adapters of rank {rank}, {count} x {prompt} + {output} tokens", calls, rounds
                    )


CASES = (parallel,)
