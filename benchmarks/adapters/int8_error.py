"""Error of logits with an adapter in bfloat16, and with the same adapter in int8, against float32.

    python -m benchmarks.adapters.int8_error
    python -m benchmarks.adapters.int8_error --rank 64 --passages 12

The texts are prefixes of passages of this repository's documentation; one random adapter is on all linears.
Prints the error of the logits (the norm of the difference, relative to their norm), how often the most likely
next token is the same, and the Kullback-Leibler divergence of the next token's distribution, in nats.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from aioengine.adapters.store import AdapterStore
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import LORA_MODULES, Quantization
from aioengine.model.text.tokenizer import Tokenizer
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork, StepBatch
from benchmarks.engine.quantized_accuracy import BLOCK, LENGTH, Logits, passages

VARIANTS: dict[str, tuple[torch.dtype, Quantization, torch.dtype]] = {
    "float32": (torch.float32, "none", torch.float32),
    "bfloat16, adapter bfloat16": (torch.bfloat16, "none", torch.bfloat16),
    "bfloat16, adapter int8": (torch.bfloat16, "none", torch.int8),
    "float32, adapter bfloat16": (torch.float32, "none", torch.bfloat16),
    "float32, adapter int8": (torch.float32, "none", torch.int8),
    "int8 weights, adapter bfloat16": (torch.bfloat16, "int8", torch.bfloat16),
    "int8 weights, adapter int8": (torch.bfloat16, "int8", torch.int8),
}
"""The model's dtype and quantization, and the adapter's dtype. All are compared with the first."""
EVERY = 4
"""Every n-th prefix is used."""


def logits_of(model: str, variant: str, adapter: Path, rank: int, texts: list[list[int]]) -> Tensor:
    """[positions, vocabulary]"""
    dtype, quantization, lora_dtype = VARIANTS[variant]
    path, sample = resolve_model(model), Logits()
    spec = read_spec(path)
    runner = ModelRunner(
        spec,
        path,
        dtype=dtype,
        device="cpu",
        num_blocks=LENGTH * LENGTH // BLOCK,
        block_size=BLOCK,
        max_loras=1,
        max_lora_rank=rank,
        lora_dtype=lora_dtype,
        sample=sample,
        quantization=quantization,
    )
    store = AdapterStore(
        spec,
        max_rank=rank,
        target_modules=LORA_MODULES,
        dtype=lora_dtype,
        affine_dtype=dtype,
        weights=runner.decoder.base_weight,
    )
    assert runner.lora_slots is not None
    runner.lora_slots.write(0, store.read("adapter", str(adapter)))
    found, width = [], LENGTH // BLOCK
    for text in texts:
        work = []
        for i in range(EVERY - 1, LENGTH, EVERY):
            ids, table = text[: i + 1], list(range(i * width, (i + 1) * width))
            work.append(SequenceWork(str(i), 0, ids, 0, table, True, SamplingParams(), 0, ids, len(ids)))
        runner.execute(StepBatch(0, work, [rank]))
        found.append(sample.kept)
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--passages", type=int, default=6)
    args = parser.parse_args()
    texts = passages(Tokenizer.from_dir(resolve_model(args.model)), args.passages)
    with tempfile.TemporaryDirectory() as folder:
        spec = read_spec(resolve_model(args.model))
        adapter = write_random_adapter(Path(folder) / "adapter", spec, args.rank, seed=0, dtype="float32")
        found = {name: logits_of(args.model, name, adapter, args.rank, texts) for name in VARIANTS}
    exact = found.pop("float32")
    table = Table(title=f"against float32, {len(exact)} positions of English text, rank {args.rank}")
    for column in ("", "error of logits", "same next token", "divergence (mean)"):
        table.add_column(column, justify="right" if column else "left")
    known = exact.log_softmax(-1)
    for name, logits in found.items():
        error = ((logits - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()
        same = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
        divergence = (known.exp() * (known - logits.log_softmax(-1))).sum(-1).mean().item()
        table.add_row(name, f"{error:.2%}", f"{same:.1%}", f"{divergence:.5f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
