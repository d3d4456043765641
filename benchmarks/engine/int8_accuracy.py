"""How much bfloat16, int8 weights and an int8 KV cache change what the model says, against float32.

    python -m benchmarks.engine.int8_accuracy

Every prefix of passages of this repository's documentation, as far as 64 tokens, is given to the model in
float32, in bfloat16, and in bfloat16 with int8 weights, an int8 KV cache, and both. Prints how often the most
likely next token is the same, and the Kullback-Leibler divergence of the next token's distribution, in nats.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.runner import ModelRunner
from aioengine.model.text.tokenizer import Tokenizer
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch

BLOCK = 16
LENGTH = 64
VARIANTS = (
    ("float32", "none", "auto"),
    ("bfloat16", "none", "auto"),
    ("bfloat16", "none", "int8"),
    ("bfloat16", "int8", "auto"),
    ("bfloat16", "int8", "int8"),
)
"""dtype, quantization, kv_cache_dtype"""


def passages(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Paragraphs of the documentation that are long enough, cut to ``LENGTH`` tokens."""
    found = []
    for file in sorted((Path(__file__).parents[2] / "docs").glob("*.md")):
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            if paragraph[:1].isalpha() and len(ids := tokenizer.encode(paragraph)) >= LENGTH:
                found.append(ids[:LENGTH])
    return found[:: max(1, len(found) // count)][:count]


class Logits:
    """A sampler that keeps the logits."""

    def __init__(self) -> None:
        self.kept = torch.empty(0)

    def __call__(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        self.kept = logits.float()
        return [Sampled(0) for _ in rows]


def prefixes(passage: list[int]) -> StepBatch:
    """A sequence for every prefix, all in one step."""
    width = LENGTH // BLOCK
    work = []
    for i in range(LENGTH):
        ids = passage[: i + 1]
        table = list(range(i * width, (i + 1) * width))
        work.append(SequenceWork(str(i), -1, ids, 0, table, True, SamplingParams(), 0, ids, len(ids)))
    return StepBatch(0, work, [])


def log_probabilities(
    model: str, dtype: str, quantization: str, cache: str, texts: list[list[int]]
) -> Tensor:
    """[positions, vocab]"""
    path, logits = resolve_model(model), Logits()
    runner = ModelRunner(
        read_spec(path),
        path,
        dtype=getattr(torch, dtype),
        device="cpu",
        num_blocks=LENGTH * LENGTH // BLOCK,
        block_size=BLOCK,
        sample=logits,
        quantization=quantization,  # type: ignore[arg-type]
        int8_cache=cache == "int8",
    )
    found = []
    for text in texts:
        runner.execute(prefixes(text))
        found.append(logits.kept.log_softmax(-1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--passages", type=int, default=12)
    args = parser.parse_args()
    texts = passages(Tokenizer.from_dir(resolve_model(args.model)), args.passages)
    exact, *others = (log_probabilities(args.model, *variant, texts) for variant in VARIANTS)
    table = Table(title=f"against float32, {len(exact)} positions of English text")
    for column in ("", "same next token", "divergence (mean)", "divergence (99%)"):
        table.add_column(column, justify="right" if column else "left")
    for (dtype, quantization, cache), found in zip(VARIANTS[1:], others, strict=True):
        same = (found.argmax(-1) == exact.argmax(-1)).float().mean().item()
        divergence = (exact.exp() * (exact - found)).sum(-1)
        name = dtype if quantization == "none" else f"{quantization} weights"
        name += "" if cache == "auto" else f", {cache} cache"
        cells = (f"{same:.1%}", f"{divergence.mean().item():.4f}", f"{divergence.quantile(0.99).item():.4f}")
        table.add_row(name, *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
