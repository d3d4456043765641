"""Steps of fixed sizes, each recorded once and played back: CUDA graphs.

Enqueuing a step's launches one by one takes the host longer than a small step takes the GPU. A graph is one
launch, but it computes the same shapes on the same addresses every time. So a step is padded to the next of
few sizes, what differs from step to step lies at fixed addresses, and a size is recorded for steps without
adapters, with adapters, and with adapters that scale or shift (DoRA, biases). Decode steps are padded to
numbers of sequences, steps with parts of prompts to numbers of tokens. Steps of more tokens, which keep a GPU
busy for longer than the host needs, run as they would without.

With several ranks the sums and gathers between them are recorded, too. All ranks record and play the same
sizes in the same order, because what is played depends only on what all of them know: the batch, and which
adapters have trained tokens. (Whether an adapter scales or shifts may differ from rank to rank; nothing is
exchanged for that.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import LoRABatch, Span
from aioengine.kernels.triton.launch import capability
from aioengine.kernels.triton.query_tiles import rows_of_prompts
from aioengine.kernels.triton.recorded_step import RecordedShape, RecordedStep
from aioengine.kernels.triton.table import SHORT, expand_config, shrink_config
from aioengine.model.cuda.working_memory import sizes
from aioengine.model.model import Model, StepInputs
from aioengine.model.slots.pool import LoRASlots
from aioengine.step import SequenceWork

Step = Callable[[], object]
Record = Callable[[Step], Step]
"""Function that records a step. It returns a function that computes the step again, from and into the same
memory."""


class DecodeLimits(NamedTuple):
    """Upper bounds on decode steps."""

    max_num_seqs: int
    max_model_len: int
    mixed: tuple[int, ...] = ()
    """Numbers of tokens that steps with parts of prompts are padded to; () leaves such steps alone."""


class DecodeSteps:
    """Plays decode steps, and mixed ones, back. Recording them, when this is made, takes some time for each
    size.

    ``vocab_size`` is that of the logits, which all ranks have.
    """

    def __init__(self, model: Model, vocab_size: int, limits: DecodeLimits, record: Record) -> None:
        spec, slots, device = model.spec, model.slots, model.device
        block_size, bits = model.cache.block_size, 8 * model.dtype.itemsize
        self._forward, self._slots = model.forward, slots
        self._max_rank = 1 if slots is None else slots.layout.max_rank
        shape = RecordedShape(
            limits.max_num_seqs,
            -(-limits.max_model_len // block_size),
            block_size,
            0 if slots is None else slots.max_loras,
            self._max_rank,
            spec.num_heads // spec.num_kv_heads,
            rows_of_prompts(bits, spec.head_dim, capability(device)),
            SHORT if slots is None else _prompt_tile(slots, bits),
        )
        self._most = limits.max_num_seqs
        self._decodes = [RecordedStep(n, shape, device, decodes=True) for n in sizes(self._most)]
        self._mixed = [RecordedStep(size, shape, device) for size in sorted(limits.mixed)]
        # One for all sizes: the memory of a graph is used by the next one that is played.
        self._logits = torch.empty(limits.max_num_seqs, vocab_size, dtype=model.dtype, device=device)
        self._recorded: dict[tuple[RecordedStep, str], Step] = {}
        with torch.inference_mode():
            for step in reversed(self.recorded):  # the largest first: the others fit into its memory
                for kind in ("base",) if slots is None else ("base", "lora", "affine"):
                    self._recorded[step, kind] = record(partial(self._compute, step, kind))

    @property
    def recorded(self) -> list[RecordedStep]:
        """Steps of all sizes, decodes first."""
        return [*self._decodes, *self._mixed]

    def run(self, sequences: Sequence[SequenceWork], slot_ranks: Sequence[int]) -> Tensor | None:
        """Return the logits [N, vocab] of those sequences that ask for a token, valid until the next call;
        None if this is no step of the recorded sizes, or it scales an adapter, or has one with trained tokens
        or of a rank beyond the recorded one."""
        most = self._max_rank
        if any(row.scale != 1.0 or (row.slot >= 0 and slot_ranks[row.slot] > most) for row in sequences):
            return None
        tokens = [] if self._slots is None else self._slots.tokens
        if any(work.slot >= 0 and tokens[work.slot] is not None for work in sequences if tokens):
            return None
        counts = [len(work.tokens) for work in sequences]
        asking = [i for i, work in enumerate(sequences) if work.sample]
        decodes = len(asking) == sum(counts)
        steps = self._decodes if decodes else self._mixed
        step = next((step for step in steps if step.size >= sum(counts)), None)
        # The engine's first steps ask for nothing: they compile what launched steps need.
        if step is None or not asking or len(sequences) > self._most:
            return None
        if any(work.draft or work.score or len(work.block_table) > step.table_width for work in sequences):
            return None
        ends = list(accumulate(counts))
        lora = asked = self._batch(sequences, counts, slot_ranks)
        if not decodes:
            asked = self._batch([sequences[i] for i in asking], [1] * len(asking), slot_ranks)
        filled = step.fill(
            [token for work in sequences for token in work.tokens],
            [Span(end - n, n, work.start) for end, n, work in zip(ends, counts, sequences, strict=True)],
            [work.block_table for work in sequences],
            [ends[i] - 1 for i in asking],
            lora,
            asked,
        )
        if not filled:
            return None
        self._recorded[step, _kind(lora)]()
        return self._logits[: len(asking)]

    def _batch(
        self, sequences: Sequence[SequenceWork], counts: Sequence[int], slot_ranks: Sequence[int]
    ) -> LoRABatch:
        affine = () if self._slots is None else self._slots.has_affine
        ranks = () if self._slots is None else slot_ranks
        return LoRABatch([work.slot for work in sequences], counts, ranks, slot_affine=affine)

    def _compute(self, step: RecordedStep, kind: str) -> None:
        inputs = StepInputs(step.token_ids, step.rows, step.attention, *step.plans[kind])
        self._logits[: len(step.rows)].copy_(self._forward(inputs))


def _kind(lora: LoRABatch) -> str:
    """Return which recording computes a step."""
    return "affine" if lora.affine else "lora" if lora.segments else "base"


def _prompt_tile(slots: LoRASlots, bits: int) -> int:
    """Return the largest tile of tokens that every launch of an adapter in a mixed step can take."""
    pools = [pool for layer in (*slots.layers, slots.outer) for pool in layer.values()]
    found = [SHORT * 4]
    for pool in pools:
        rank = pool.slots.max_rank
        found.append(shrink_config(bits, rank, pool.in_features, SHORT + 1).block_m)
        found.append(expand_config(bits, rank, sum(pool.widths), SHORT + 1).block_m)
    return min(found)


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
