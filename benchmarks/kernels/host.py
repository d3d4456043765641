"""Host time of steps on a GPU that computes nothing: what the processor does while a GPU waits for it.

    python -m benchmarks.kernels.host
    python -m benchmarks.kernels.host --profile eager

Llama 3 8B's shapes with all layers, 64 sequences, 8 adapters of rank 16. Triton "launches" on a driver that
does nothing, and tensors have no data, so that this needs no GPU (``tests/support/fake_gpu.py``). Prints
medians of processor time, which a busy machine disturbs less than time on the clock. What a real driver and
cuBLAS add for each launch is not in it.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aioengine.model.penalties import CountTables
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork
from benchmarks.shared.report import arguments, console, new_table

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # where the stand-in for a GPU is
from gpu_without_gpu.scenarios import Model, Row, llama

Work = Callable[[], object]
BUDGETS = {"eager": 8.0, "mixed": 1.0, "decode": 0.5, "penalties": 0.3}
"""Milliseconds that each may take on a quiet core."""
SEQUENCES, CONTEXT, HISTORY = 64, 1000, 4000


def eager_step(layers: int) -> Work:
    """A mixed step that is launched one operation after the other: 63 decodes and a prompt of 200 tokens."""
    model = Model(llama(num_layers=layers, vocab_size=128256))
    model.gpu.checks = False
    functional.linear = _product  # type: ignore[assignment]
    Tensor.new_empty = _new_empty  # type: ignore[assignment,method-assign]
    decodes = [Row(i * 8 // SEQUENCES, CONTEXT + i, 1) for i in range(SEQUENCES - 1)]
    rows = [*decodes, Row(7, 0, 200)]
    return lambda: model.step(rows)


# torch's functions for tensors without data are written in Python, and take longer than those for a GPU.


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return memory for the result, which is all that the host has to do beside cuBLAS's launch."""
    return x.new_empty(x.shape[0], weight.shape[0])


def _new_empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    return torch.empty(*shape, dtype=dtype or like.dtype, **{"device": like.device, **options})


def decode_step(layers: int) -> Work:
    """A decode step that is played back: its inputs, and one call in the place of the graph's launch."""
    return _played([1] * SEQUENCES)


def mixed_step(layers: int) -> Work:
    """63 decodes and a prompt of 200 tokens, played back."""
    return _played([1] * (SEQUENCES - 1) + [200])


def _played(counts: Sequence[int]) -> Work:
    model = Model(llama(num_layers=1, vocab_size=128256))  # the graph has the layers
    steps = model.recorded(SEQUENCES, 8192, record=lambda step: lambda: None)
    ranks = [16] * 8
    turn = 0

    def step() -> object:
        nonlocal turn
        turn += 1
        now = [_work(i, CONTEXT + i + turn, count) for i, count in enumerate(counts)]
        began = time.process_time()
        logits = steps.run(now, ranks)
        taken = time.process_time() - began
        assert logits is not None, "this step is not played back"
        return taken

    return step


def penalties(layers: int) -> Work:
    """Penalties of 64 requests that have 4,000 tokens each, and get another one in each step."""
    vocab = 64  # few, since here the host computes what a GPU would
    tables, scores = CountTables(vocab, torch.device("cpu"), SEQUENCES), torch.zeros(SEQUENCES, vocab)
    params = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1)
    histories = [[(7 * i + j) % vocab for j in range(HISTORY)] for i in range(SEQUENCES)]

    def step() -> object:
        for history in histories:
            history.append(5)
        active = [
            (i, SequenceWork(str(i), -1, [5], HISTORY, [], True, params, i, histories[i], 100))
            for i in range(SEQUENCES)
        ]
        began = time.process_time()
        tables.apply(scores, active)
        return time.process_time() - began

    return step


def _work(i: int, start: int, count: int) -> SequenceWork:
    table = list(range(i * 100, i * 100 + (start + count) // 16 + 1))
    slot = i * 8 // SEQUENCES
    return SequenceWork(str(i), slot, [5] * count, start, table, True, SamplingParams(), i, [5], 1)


KINDS: dict[str, Callable[[int], Work]] = {
    "eager": eager_step,
    "mixed": mixed_step,
    "decode": decode_step,
    "penalties": penalties,
}


def milliseconds(work: Work, repeats: int) -> list[float]:
    """Return the processor time of each call, or what the call returns, in seconds, as its time."""
    taken = []
    for _ in range(repeats + 3):
        began = time.process_time()
        said = work()
        own = time.process_time() - began
        taken.append(1e3 * (said if isinstance(said, float) else own))
    return sorted(taken[3:])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--profile", choices=KINDS, help="print where its time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        work = KINDS[args.profile](args.layers)
        milliseconds(work, 3)
        with cProfile.Profile() as profile:
            milliseconds(work, 20)
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        return
    title = f"Host time of a step, {args.layers} layers, {SEQUENCES} sequences; ms of processor time"
    table = new_table(title, "what", "budget", "least", "median", "90%")
    for kind in args.only:
        found = milliseconds(KINDS[kind](args.layers), args.repeats)
        cells = (found[0], statistics.median(found), found[len(found) * 9 // 10])
        table.add_row(kind, f"{BUDGETS[kind]:.1f}", *(f"{value:.2f}" for value in cells))
    console().print(table)


if __name__ == "__main__":
    main()
