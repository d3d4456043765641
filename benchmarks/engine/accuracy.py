"""How much narrower numbers change what the model says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.text.tokenizer import Tokenizer
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch
from benchmarks.report import Table
from benchmarks.shared.engines import fill_slots
from benchmarks.shared.texts import paragraphs

BLOCK, LENGTH = 16, 64


class Variant(NamedTuple):
    """How a model is run."""

    dtype: str
    quantization: str = "none"
    cache: str = "auto"
    adapter: torch.dtype | None = None

    def __str__(self) -> str:
        words = [self.dtype if self.quantization == "none" else f"{self.quantization} weights"]
        words += [] if self.cache == "auto" else [f"{self.cache} cache"]
        words += [] if self.adapter is None else [f"adapter {str(self.adapter).removeprefix('torch.')}"]
        return ", ".join(words)


WITHOUT = (
    Variant("float32"),
    Variant("bfloat16"),
    Variant("bfloat16", "none", "int8"),
    Variant("bfloat16", "none", "fp8"),
    Variant("bfloat16", "int8"),
    Variant("bfloat16", "int8", "int8"),
    Variant("bfloat16", "fp8"),
    Variant("bfloat16", "int4"),
)
WITH = tuple(
    Variant(dtype, quantization, adapter=adapter)
    for dtype, quantization in (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"))
    for adapter in (torch.bfloat16, torch.int8)
)


class Logits:
    """A sampler that keeps the logits."""

    def __init__(self) -> None:
        self.kept = torch.empty(0)

    def __call__(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        self.kept = logits.float()
        return [Sampled(0) for _ in rows]


def passages(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Return paragraphs of the documentation that are long enough, cut to ``LENGTH`` tokens."""
    found = [ids[:LENGTH] for text in paragraphs() if len(ids := tokenizer.encode(text)) >= LENGTH]
    return found[:: max(1, len(found) // count)][:count]


def logits_of(
    model: Path, texts: list[list[int]], variant: Variant, adapter: Path | None, rank: int
) -> Tensor:
    """Compute the logits [positions, vocabulary] after every fourth prefix of the texts."""
    logits, spec, dtype = Logits(), read_spec(model), getattr(torch, variant.dtype)
    runner = build_runner(
        spec,
        model,
        dtype=dtype,
        device="cpu",
        num_blocks=LENGTH * LENGTH // BLOCK,
        block_size=BLOCK,
        max_loras=int(adapter is not None),
        max_lora_rank=rank,
        lora_dtype=variant.adapter,
        sample=logits,
        quantization=variant.quantization,  # type: ignore[arg-type]
        kv_cache_dtype=variant.cache,
        kernels="torch" if variant.cache == "fp8" else None,  # a CPU's have none, and a GPU's are compared
    )
    if adapter is not None:
        fill_slots(runner, adapter)
    found = []
    for text in texts:
        runner.execute(prefixes(text, rank if adapter else None))
        found.append(logits.kept)
    return torch.cat(found)


def prefixes(passage: list[int], rank: int | None) -> StepBatch:
    """Build a step with a sequence for every fourth prefix, with an adapter or without."""
    width, work = LENGTH // BLOCK, []
    for i in range(3, LENGTH, 4):
        ids, table = passage[: i + 1], list(range(i * width, (i + 1) * width))
        slot = -1 if rank is None else 0
        work.append(SequenceWork(str(i), slot, ids, 0, table, True, SamplingParams(), 0, ids, len(ids)))
    return StepBatch(0, work, [] if rank is None else [rank])


def accuracy(
    *, model: str = "smollm2-135m", texts: int = 12, rank: int = 16, against: str = "float32"
) -> Iterator[Table]:
    """What bfloat16, quantized weights, caches and adapters change, on prefixes of this documentation.

    Prints how often the most likely next token is the same, the Kullback-Leibler divergence of its
    distribution in nats, and the error of the logits relative to their norm.
    """
    path = resolve_model(model)
    cut = passages(Tokenizer.load(path), texts)
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_random_adapter(Path(folder) / "a", read_spec(path), rank, seed=0, dtype="float32")
        for used, variants in ((None, WITHOUT), (adapter, WITH)):
            exact = logits_of(
                path, cut, Variant(against, adapter=used and getattr(torch, against)), used, rank
            )
            rows = [
                [str(variant), *compared(logits_of(path, cut, variant, used, rank), exact)]
                for variant in variants
                if variant != Variant(against)
            ]
            title = f"Against {against}, {len(exact)} positions" + (
                f", an adapter of rank {rank}" if used else ""
            )
            columns = ["", "same next token", "divergence (mean)", "divergence (99%)", "error of logits"]
            yield Table(title, columns, rows)


def compared(found: Tensor, exact: Tensor) -> list[str]:
    known, logs = exact.log_softmax(-1), found.log_softmax(-1)
    same = (found.argmax(-1) == exact.argmax(-1)).float().mean().item()
    divergence = (known.exp() * (known - logs)).sum(-1)
    error = ((found - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()
    cells = f"{same:.1%}", f"{divergence.mean().item():.5f}", f"{divergence.quantile(0.99).item():.5f}"
    return [*cells, f"{error:.2%}"]


CASES = (accuracy,)
