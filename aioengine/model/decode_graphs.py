"""Decode steps of fixed sizes, each recorded once and played back: CUDA graphs.

Enqueuing a step's launches one by one takes the host longer than a small step takes the GPU. A graph is one
launch, but it computes the same shapes on the same addresses every time. So a step is padded to the next of
few sizes, what differs from step to step lies at fixed addresses, and a size is recorded for steps without
adapters, with adapters, and with adapters that scale or shift (DoRA, biases). Prompts run as they would
without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import LoRABatch
from aioengine.kernels.triton.fixed_step import FixedStep
from aioengine.model.cuda.working_memory import sizes
from aioengine.model.decoder import StepInputs
from aioengine.model.slots.pool import LoRASlots
from aioengine.step import SequenceWork

Step = Callable[[], object]
Record = Callable[[Step], Step]
"""Makes of a function that computes a step one that computes it again, from and into the same memory."""


class DecodeLimits(NamedTuple):
    """Upper bounds on decode steps."""

    max_num_seqs: int
    max_model_len: int


class DecodeSteps:
    """Plays decode steps back. Recording them, when this is made, takes some time for each size.

    ``forward`` computes a step's logits. The vocabulary and dtype are those of the logits.
    """

    def __init__(
        self,
        forward: Callable[[StepInputs], Tensor],
        limits: DecodeLimits,
        slots: LoRASlots | None,
        *,
        block_size: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        record: Record,
    ) -> None:
        self._forward, self._slots = forward, slots
        self._steps = {
            size: FixedStep(
                size,
                table_width=-(-limits.max_model_len // block_size),
                block_size=block_size,
                slots=0 if slots is None else slots.max_loras,
                max_rank=1 if slots is None else slots.layout.max_rank,
                device=device,
            )
            for size in sizes(limits.max_num_seqs)
        }
        # One for all sizes: the memory of a graph is used by the next one that is played.
        self._logits = torch.empty(limits.max_num_seqs, vocab_size, dtype=dtype, device=device)
        self._recorded: dict[tuple[int, str], Step] = {}
        with torch.inference_mode():
            for size in reversed(self._steps):  # the largest first: the others fit into its memory
                for kind in ("base",) if slots is None else ("base", "lora", "affine"):
                    self._recorded[size, kind] = record(partial(self._compute, self._steps[size], kind))

    @property
    def nbytes(self) -> int:
        """Device memory of inputs and logits; what recorded steps compute in is not counted."""
        return self._logits.nbytes + sum(step.nbytes for step in self._steps.values())

    def run(self, sequences: Sequence[SequenceWork], slot_ranks: Sequence[int]) -> Tensor | None:
        """Return the logits [N, vocab] of these sequences, valid until the next call; None if they are no
        decode step of the recorded sizes, or an adapter has trained tokens."""
        if any(len(work.tokens) != 1 or not work.sample for work in sequences):
            return None
        step = next((step for size, step in self._steps.items() if size >= len(sequences)), None)
        if step is None or any(len(work.block_table) > step.table_width for work in sequences):
            return None
        tokens = [] if self._slots is None else self._slots.tokens
        if any(work.slot >= 0 and tokens[work.slot] is not None for work in sequences if tokens):
            return None
        affine = () if self._slots is None else self._slots.has_affine
        ranks = () if self._slots is None else slot_ranks
        lora = LoRABatch([work.slot for work in sequences], [1] * len(sequences), ranks, slot_affine=affine)
        step.fill(
            [work.tokens[0] for work in sequences],
            [work.start for work in sequences],
            [work.block_table for work in sequences],
            lora,
        )
        kind = "affine" if lora.affine else "lora" if lora.segments else "base"
        self._recorded[step.size, kind]()
        return self._logits[: len(sequences)]

    def _compute(self, step: FixedStep, kind: str) -> None:
        lora: LoRABatch = getattr(step, kind)
        inputs = StepInputs(step.token_ids, step.rows, step.attention, lora, lora)
        self._logits[: step.size].copy_(self._forward(inputs))


class CudaGraphs:
    """Records steps as CUDA graphs, which share the memory that they compute in.

    Only one may be played at a time, and nothing of a step may be read after the next one has been played.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._aside: torch.cuda.Stream | None = None
        """Stream of all warm-up runs. One is enough, and more would cost memory: cuBLAS keeps a workspace for
        each stream that it has seen."""

    def __call__(self, step: Step) -> Step:
        """Runs ``step`` once, which compiles kernels, and records it."""
        with torch.cuda.device(self._device):
            if self._aside is None:
                self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
