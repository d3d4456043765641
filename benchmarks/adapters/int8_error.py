"""Error of logits with an adapter in bfloat16, and with the same adapter in int8, against float32.

    python -m benchmarks.adapters.int8_error
    python -m benchmarks.adapters.int8_error --rank 64 --passages 12

The texts are prefixes of passages of this repository's documentation; one random adapter is on all linears.
Prints the error of the logits (the norm of the difference, relative to their norm), how often the most likely
next token is the same, and the Kullback-Leibler divergence of the next token's distribution, in nats.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.text.tokenizer import Tokenizer
from benchmarks.engine.quantized_accuracy import Adapter, logits_of, passages
from benchmarks.shared.report import arguments, console, new_table

VARIANTS = {
    "float32": ("float32", "none", torch.float32),
    "bfloat16, adapter bfloat16": ("bfloat16", "none", torch.bfloat16),
    "bfloat16, adapter int8": ("bfloat16", "none", torch.int8),
    "float32, adapter bfloat16": ("float32", "none", torch.bfloat16),
    "float32, adapter int8": ("float32", "none", torch.int8),
    "int8 weights, adapter bfloat16": ("bfloat16", "int8", torch.bfloat16),
    "int8 weights, adapter int8": ("bfloat16", "int8", torch.int8),
}
"""The model's dtype and quantization, and the adapter's dtype. All are compared with the first."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--passages", type=int, default=6)
    args = parser.parse_args()
    model = resolve_model(args.model)
    texts = passages(Tokenizer.from_dir(model), args.passages)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        write_random_adapter(path, read_spec(model), args.rank, seed=0, dtype="float32")
        found = {
            name: logits_of(model, texts, dtype, weights, adapter=Adapter(path, args.rank, kind), every=4)
            for name, (dtype, weights, kind) in VARIANTS.items()
        }
    exact = found.pop("float32")
    title = f"against float32, {len(exact)} positions of English text, rank {args.rank}"
    table = new_table(title, "", "error of logits", "same next token", "divergence (mean)")
    known = exact.log_softmax(-1)
    for name, logits in found.items():
        error = ((logits - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()
        same = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
        divergence = (known.exp() * (known - logits.log_softmax(-1))).sum(-1).mean().item()
        table.add_row(name, f"{error:.2%}", f"{same:.1%}", f"{divergence:.5f}")
    console().print(table)


if __name__ == "__main__":
    main()
