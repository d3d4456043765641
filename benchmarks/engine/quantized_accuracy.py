"""How much bfloat16, int8, fp8 and int4 weights and int8 and fp8 KV caches change what the model says.

    python -m benchmarks.engine.quantized_accuracy
    python -m benchmarks.engine.quantized_accuracy --against bfloat16

The model computes every prefix of passages of this repository's documentation, up to 64 tokens, in float32,
in bfloat16, and in bfloat16 with quantized weights, with an int8 or fp8 KV cache, and with both. Prints how
often the most likely next token is the same, and the Kullback-Leibler divergence of the next token's
distribution, in nats. For comparison with int4, all matrices are also rounded to GGUF's Q4_0, which takes as
many bits, and used in bfloat16 (needs the package gguf).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.adapters.store import AdapterStore
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import LORA_MODULES
from aioengine.model.text.tokenizer import Tokenizer
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch
from benchmarks.shared.report import arguments, console, new_table

BLOCK = 16
LENGTH = 64
VARIANTS = (
    ("float32", "none", "auto"),
    ("bfloat16", "none", "auto"),
    ("bfloat16", "none", "int8"),
    ("bfloat16", "none", "fp8"),
    ("bfloat16", "int8", "auto"),
    ("bfloat16", "int8", "int8"),
    ("bfloat16", "fp8", "auto"),
    ("bfloat16", "int4", "auto"),
)
"""dtype, quantization, kv_cache_dtype"""


def passages(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Return paragraphs of the documentation that are long enough, cut to ``LENGTH`` tokens."""
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


class Adapter(NamedTuple):
    path: Path
    rank: int
    dtype: torch.dtype


def prefixes(passage: list[int], every: int, adapter: Adapter | None) -> StepBatch:
    """Build a step with a sequence for every n-th prefix."""
    width, slot = LENGTH // BLOCK, -1 if adapter is None else 0
    work = []
    for i in range(every - 1, LENGTH, every):
        ids = passage[: i + 1]
        table = list(range(i * width, (i + 1) * width))
        work.append(SequenceWork(str(i), slot, ids, 0, table, True, SamplingParams(), 0, ids, len(ids)))
    return StepBatch(0, work, [] if adapter is None else [adapter.rank])


def write_as_q4_0(model: Path, folder: Path) -> None:
    """Load the model with matrices rounded to Q4_0: 32 weights share a scale of 16 bits."""
    from gguf import GGMLQuantizationType, quants
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, Tensor] = {}
    for file in model.glob("*.safetensors"):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            stored = quants.quantize(tensor.float().numpy(), GGMLQuantizationType.Q4_0)
            rounded = quants.dequantize(stored, GGMLQuantizationType.Q4_0)
            tensors[name] = torch.from_numpy(rounded).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors")


def logits_of(
    path: Path,
    texts: list[list[int]],
    dtype: str,
    quantization: str = "none",
    cache: str = "auto",
    *,
    adapter: Adapter | None = None,
    every: int = 1,
) -> Tensor:
    """Compute the logits [positions, vocabulary] after every n-th prefix of the texts."""
    logits, spec, kind = Logits(), read_spec(path), getattr(torch, dtype)
    runner = ModelRunner(
        spec,
        path,
        dtype=kind,
        device="cpu",
        num_blocks=LENGTH * LENGTH // BLOCK,
        block_size=BLOCK,
        max_loras=0 if adapter is None else 1,
        max_lora_rank=16 if adapter is None else adapter.rank,
        lora_dtype=None if adapter is None else adapter.dtype,
        sample=logits,
        quantization=quantization,  # type: ignore[arg-type]
        int8_cache=cache == "int8",
        fp8_cache=cache == "fp8",
        kernels="torch" if cache == "fp8" else None,  # those of a CPU have none, and a GPU's are compared
    )
    if adapter is not None:
        store = AdapterStore(
            spec,
            max_rank=adapter.rank,
            target_modules=LORA_MODULES,
            dtype=adapter.dtype,
            affine_dtype=kind,
            weights=runner.decoder.base_weight,
        )
        assert runner.lora_slots is not None
        runner.lora_slots.write(0, store.read("adapter", str(adapter.path)))
    found = []
    for text in texts:
        runner.execute(prefixes(text, every, adapter))
        found.append(logits.kept)
    return torch.cat(found)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--against", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    model = resolve_model(args.model)
    texts = passages(Tokenizer.from_dir(model), args.passages)
    exact = logits_of(model, texts, args.against).log_softmax(-1)
    title = f"against {args.against}, {len(exact)} positions of English text"
    table = new_table(title, "", "same next token", "divergence (mean)", "divergence (99%)")

    def add(name: str, logits: Tensor) -> None:
        found = logits.log_softmax(-1)
        same = (found.argmax(-1) == exact.argmax(-1)).float().mean().item()
        divergence = (exact.exp() * (exact - found)).sum(-1)
        cells = (f"{same:.1%}", f"{divergence.mean().item():.4f}", f"{divergence.quantile(0.99).item():.4f}")
        table.add_row(name, *cells)

    for dtype, quantization, cache in VARIANTS:
        if (dtype, quantization, cache) == (args.against, "none", "auto"):
            continue
        name = dtype if quantization == "none" else f"{quantization} weights"
        name += "" if cache == "auto" else f", {cache} cache"
        add(name, logits_of(model, texts, dtype, quantization, cache))
    with tempfile.TemporaryDirectory() as folder:
        write_as_q4_0(model, Path(folder) / "model")
        add("Q4_0 weights", logits_of(Path(folder) / "model", texts, "bfloat16"))
    console().print(table)


if __name__ == "__main__":
    main()
