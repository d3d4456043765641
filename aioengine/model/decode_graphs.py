"""Steps of fixed sizes, each recorded once and played back: CUDA graphs.

Enqueuing a step's launches one by one takes the host longer than a small step takes the GPU. A graph is one
launch, but it computes the same shapes on the same addresses every time. So a step is padded to the next of
few sizes, what differs from step to step lies at fixed addresses, and a size is recorded for steps without
adapters, with adapters, and with adapters that scale or shift (DoRA, biases). Steps with parts of prompts run
as they would without.

With several ranks the sums and gathers between them are recorded, too. All ranks record and play the same
sizes in the same order, because what is played depends only on what all of them know: the batch, and which
adapters have trained tokens. (Whether an adapter scales or shifts may differ from rank to rank; nothing is
exchanged for that.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import LoRABatch
from aioengine.kernels.triton.recorded_step import RecordedShape, RecordedStep
from aioengine.model.model import Model, StepInputs
from aioengine.model.parallel.group import Record, Step
from aioengine.step import SequenceWork

__all__ = ["CudaGraphs", "DecodeLimits", "DecodeSteps", "Record", "Step"]


class DecodeLimits(NamedTuple):
    """Upper bounds on decode steps."""

    max_num_seqs: int
    max_model_len: int


def sizes(most: int) -> list[int]:
    """List the batch sizes that recorded steps of up to ``most`` sequences are padded to: 1, 2, 4, then every
    8, and beyond 64 eight for each doubling."""
    found = [size for size in (1, 2, 4) if size < most]
    size = 8
    while size < most:
        found.append(size)
        size += max(8, (1 << size.bit_length()) // 16)
    return [*found, most]


class DecodeSteps:
    """Plays decode steps back. Recording them, when this is made, takes some time for each size.

    ``vocab_size`` is that of the logits, which all ranks have.
    """

    def __init__(self, model: Model, vocab_size: int, limits: DecodeLimits, record: Record) -> None:
        spec, block_size, device, slots = model.spec, model.cache.block_size, model.device, model.slots
        self._forward, self._slots = model.forward, slots
        self._max_rank = 1 if slots is None else slots.layout.max_rank
        shape = RecordedShape(
            -(-limits.max_model_len // block_size),
            block_size,
            0 if slots is None else slots.max_loras,
            self._max_rank,
            spec.num_heads // spec.num_kv_heads,
        )
        self.recorded = [RecordedStep(size, shape, device) for size in sizes(limits.max_num_seqs)]
        """Steps of all sizes."""
        # One for all sizes: the memory of a graph is used by the next one that is played.
        self._logits = torch.empty(limits.max_num_seqs, vocab_size, dtype=model.dtype, device=device)
        self._recorded: dict[tuple[RecordedStep, str], Step] = {}
        with torch.inference_mode():
            for step in reversed(self.recorded):  # the largest first: the others fit into its memory
                for kind in ("base",) if slots is None else ("base", "lora", "affine"):
                    self._recorded[step, kind] = record(partial(self._compute, step, kind))

    @property
    def nbytes(self) -> int:
        """Device memory of inputs and logits; what recorded steps compute in is not counted."""
        return self._logits.nbytes + sum(step.nbytes for step in self.recorded)

    def run(self, sequences: Sequence[SequenceWork], slot_ranks: Sequence[int]) -> Tensor | None:
        """Return the logits [N, vocab] of the sequences, valid until the next call; None if not each of them
        has one token and asks for the next, or it scales an adapter, or has one with trained tokens or of a
        rank beyond the recorded one, or there are more than are recorded."""
        most, slots = self._max_rank, self._slots
        step = next((step for step in self.recorded if step.size >= len(sequences)), None)
        if step is None or any(
            len(row.tokens) > 1 or not row.sample or row.scale != 1.0 or row.score for row in sequences
        ):
            return None
        if any(row.slot >= 0 and slot_ranks[row.slot] > most for row in sequences):
            return None
        if slots is not None and any(r.slot >= 0 and slots.tokens[r.slot] is not None for r in sequences):
            return None
        if any(len(row.block_table) > step.table_width for row in sequences):
            return None
        lora = LoRABatch(
            [row.slot for row in sequences],
            [1] * len(sequences),
            () if slots is None else slot_ranks,
            slot_affine=() if slots is None else slots.has_affine,
        )
        step.fill(
            [row.tokens[0] for row in sequences],
            [row.start for row in sequences],
            [row.block_table for row in sequences],
            lora,
        )
        kind = "affine" if lora.affine else "lora" if lora.segments else "base"
        self._recorded[step, kind]()
        return self._logits[: len(sequences)]

    def _compute(self, step: RecordedStep, kind: str) -> None:
        lora = step.plans[kind]
        inputs = StepInputs(step.token_ids, step.rows, step.attention, lora, lora)
        self._logits[: step.size].copy_(self._forward(inputs))


class CudaGraphs:
    """Records steps as CUDA graphs, which share the memory that they compute in. NCCL's calls become a part
    of them; its communicator is made in the first run before a recording.

    Only one may be played at a time, and nothing of a step may be read after the next one has been played.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._aside: torch.cuda.Stream | None = None
        """Stream of all warm-up runs. One is enough, and more would cost memory: cuBLAS keeps a workspace for
        each stream that it has seen."""

    def __call__(self, step: Step) -> Step:
        """Run ``step`` once, which compiles kernels, and record it."""
        with torch.cuda.device(self._device):
            if self._aside is None:
                self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch has no types for it
            current, aside = torch.cuda.current_stream(), self._aside
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                step()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, self._pool, aside, capture_error_mode="thread_local"):
                step()
        return graph.replay
