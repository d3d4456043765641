"""What adapters cost in whole runs."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import torch

from aioengine import AsyncEngine, LoRAConfig
from aioengine.cli.bench import random_prompts, run_once
from aioengine.kernels.cpu.structs import PHASES
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import LORA_MODULES
from aioengine.step import StepBatch
from benchmarks.runner import Calls
from benchmarks.shared.engines import OUTPUT, PROMPT, configuration, random_adapters, spec_of

LINEARS = ("qkv", "o", "gate_up", "down")


class Recorder:
    """Sums of the seconds of steps and of their phases, of all engines in this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        execute: Any = ModelRunner.execute

        def recorded(model: Any, batch: StepBatch) -> Any:
            model.model.seconds = phases = torch.zeros(len(PHASES), dtype=torch.float64)
            began = time.perf_counter()
            result = execute(model, batch)
            prompts = any(len(work.tokens) > 1 for work in batch.sequences)
            self._add(
                "steps with prompts, ms" if prompts else "decode steps, ms", time.perf_counter() - began
            )
            for phase, seconds in zip(PHASES, phases.tolist(), strict=True):
                name = "linears and B" if phase in LINEARS else "A" if phase == "shrink" else "other phases"
                self._add(f"{name}, ms", seconds)
            return result

        ModelRunner.execute = recorded  # type: ignore[method-assign]

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + 1e3 * seconds

    def taken(self) -> dict[str, float]:
        """Return the sums since the last call."""
        found, self.seconds = self.seconds, {}
        return found


async def lora_share(
    *, model: str = "smollm2-135m", requests: int = 32, adapters: int = 32, rank: int = 16,
    lora_dtype: str = "auto", rounds: int = 3,
) -> AsyncGenerator[Calls, None]:  # fmt: skip
    """Where the time of a run with adapters goes: steps with prompts, decode steps, and their phases."""
    lora = LoRAConfig(max_loras=adapters, max_lora_rank=rank, lora_dtype=lora_dtype)
    prompts = random_prompts(spec_of(model).vocab_size, requests, PROMPT)
    with random_adapters(model, adapters, rank) as paths:
        async with AsyncEngine(configuration(model, max_num_seqs=requests, lora=lora)) as engine:
            for name, path in paths.items():
                await engine.load_adapter(name, path)
            recorder = Recorder()

            async def run(names: Sequence[str | None]) -> dict[str, float]:
                recorder.taken()
                tokens_per_second, _ = await run_once(engine, prompts, OUTPUT, names)
                return {"output tok/s": tokens_per_second, **recorder.taken()}

            sizes = [spec_of(model).linear(module) for module in LORA_MODULES]
            added = rank * sum(n + k for n, k in sizes) / sum(n * k for n, k in sizes)
            title = (
                f"{requests} x {PROMPT} + {OUTPUT} tokens, {adapters} adapters of rank {rank}, {lora_dtype}"
            )
            note = f"Medians. Adapters add {added:.1%} to the products of the linears."
            calls = {"base": lambda: run([None]), "adapters": lambda: run(list(paths))}
            yield Calls(title, calls, rounds, note=note)


CASES = (lora_share,)
