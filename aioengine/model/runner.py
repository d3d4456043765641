"""Runs steps of a model, and samples."""

from __future__ import annotations

import functools
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from aioengine.kernels import AttentionPlan, LoRABatch, Span
from aioengine.kernels.plan.decodes import DecodeTables
from aioengine.kernels.transfer import send
from aioengine.model import constraints
from aioengine.model.cuda.failures import copy_error
from aioengine.model.drafted import sample_drafted
from aioengine.model.model import LastLayer, Model, StepInputs
from aioengine.model.parallel.group import Group
from aioengine.model.penalties import Penalties
from aioengine.model.pooling import Kind, Pooled, pool
from aioengine.model.sampler import sample as default_sample
from aioengine.model.sampler import token_logprobs
from aioengine.model.slots.image import AdapterImage, calling_thread_alone
from aioengine.model.spec import ModelSpec
from aioengine.request import TokenLogprob
from aioengine.step import Sampled, SequenceWork, StepBatch, StepResult

if TYPE_CHECKING:
    from aioengine.model.decode_graphs import DecodeSteps

PIECE_BYTES = 2**25
"""Bytes of float32 logits that are computed at a time to score prompts; there are up to three such
tensors."""

Sampler = Callable[[Tensor, Sequence[SequenceWork]], list[Sampled]]
"""``sample(logits [N, vocab], rows)``: one :class:`Sampled` for each row."""


class ModelRunner:
    """Runs steps of a model of ``spec``, or of a rank's share of it; all ranks of the ``group`` must execute
    the same steps, and only rank 0 samples. Blocking; :meth:`execute` is to be called from one thread.

    :func:`aioengine.model.build.build_runner` makes one. ``pooling`` is that of requests for which neither
    the request nor its adapter chooses one; ``variance`` is why a token's bits depend on its batch
    (docs/determinism.md), None: they do not. ``decode_steps`` are steps that are played back, if there are
    any. ``sample`` replaces the default.
    """

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        group: Group,
        *,
        pooling: Kind,
        variance: str | None,
        decode_steps: DecodeSteps | None = None,
        sample: Sampler | None = None,
    ) -> None:
        self.model = model
        self.spec = spec
        self.group = group
        self.pooling: Kind = pooling
        self.variance = variance
        self.decode_steps = decode_steps
        self.kv_cache, self.lora_slots = model.cache, model.slots
        self._copier = None if model.slots is None else model.slots.copier
        self._plain_sampler = sample is None
        self._sample = sample or functools.partial(default_sample, penalties=Penalties(), argmax=model.argmax)
        self._last: Sequence[SequenceWork] = ()
        """The sequences of the last step."""
        self._tables: tuple[DecodeTables, bool] | None = None
        """Tables of decodes that are repeated, and whether all of these ask for the most likely tokens."""

    @property
    def kernels(self) -> str:
        """Name of what computes the steps, for display: "cpu-avx512", "triton", "torch", ..."""
        backend = self.model.kernels.name
        if backend != "cpu":
            return backend
        from aioengine.kernels.cpu.build import levels

        return f"cpu-{next(iter(levels()))}" + ("" if self.model.compiled else " (torch steps)")

    def execute(self, batch: StepBatch) -> StepResult:
        """Run one step: sample a token for the sequences that ask for one, and score tokens for those that
        ask for that, on rank 0."""
        began = time.perf_counter()
        result = self._decode_again(batch)
        if result is None:
            self._tables = None
            result = self._execute(batch)
        self._last = batch.sequences
        return result._replace(seconds=(time.perf_counter() - began,))

    def write(self, image: AdapterImage, slot: int, offset: int) -> float:
        """Copy an adapter into a slot that nothing reads, in any thread; returns the seconds it took. Raises
        DeviceError if the device has failed."""
        assert self.lora_slots is not None, "a slot was written while LoRA is off"
        start = time.perf_counter()
        try:
            with calling_thread_alone():
                self.lora_slots.write(slot, image, offset)
        except Exception as error:
            if (failure := copy_error(error)) is None:
                raise
            raise failure from error
        return time.perf_counter() - start

    def _execute(self, batch: StepBatch) -> StepResult:
        plain = all(work.params.is_plain for work in batch.sequences)  # nearly always
        found: list[Sequence[Sampled]] = [()] * len(batch.sequences)
        scored: dict[int, list[TokenLogprob]] = {}
        pooled: dict[int, Pooled] = {}
        if batch.sequences:
            if self.group.shard.rank == 0 and any(
                work.params.constraint is not None for work in batch.sequences
            ):
                constraints.begin(batch.sequences)
            if self._copier is not None:
                self._copier.before_step()
            with torch.inference_mode():
                logits, asking = self._logits(batch, scored, pooled)
                if self._copier is not None:
                    self._copier.after_step()
                if asking and self.group.shard.rank == 0:
                    works = [batch.sequences[i] for i in asking]
                    for i, tokens in zip(asking, self._sampled(logits, works), strict=True):
                        found[i] = tokens
                else:
                    self._wait()
        for i, work in enumerate(() if plain else batch.sequences):
            if work.sample and work.params.pooling is not None:
                error = pooled[i].error if i in pooled else None
                found[i] = (Sampled(-1, error=error, fault="request"),)
        values = {i: part.values for i, part in pooled.items()}
        return StepResult.of(found)._replace(scored=scored, pooled=values)

    def _sampled(self, logits: Tensor, works: Sequence[SequenceWork]) -> Sequence[Sequence[Sampled]]:
        """Return the tokens of each sequence: one, or more if proposed tokens are right."""
        if any(work.draft for work in works):
            return sample_drafted(logits, works, self._sample)
        return [(token,) for token in self._sample(logits, works)]

    def _decode_again(self, batch: StepBatch) -> StepResult | None:
        """Decode with the sequences of the last step. Returns None if it is not such a step, or not in the
        compiled library."""
        rows = batch.sequences
        if not batch.again or not self.model.compiled or rows is not self._last:
            return None
        if self._tables is None:
            starts, known = [row.start for row in rows], [row.block_table for row in rows]
            made = DecodeTables(starts, known, self.kv_cache.block_size)
            self._tables = made, all(row.params.is_plain for row in rows)
        tables, plain = self._tables
        steps = rows[0].start - tables.first
        tables.write(steps, [row.tokens[0] for row in rows])
        if self._copier is not None:
            self._copier.before_step()
        logits = self.model.decode_again(tables, steps)
        if logits is None:
            return None
        if self._copier is not None:
            self._copier.after_step()
        if plain and self._plain_sampler:
            tokens = tables.found.tolist()
            if min(tokens) >= 0:
                return StepResult(tokens, [1] * len(tokens), ())
        with torch.inference_mode():
            return StepResult.of(self._sampled(logits, rows))

    def _wait(self) -> None:
        """Wait until the device has finished a step from which nothing is read back. So the time of a step is
        its own, and its inputs may be overwritten afterwards."""
        if self.model.device.type == "cuda":
            torch.cuda.current_stream(self.model.device).synchronize()

    def _logits(
        self, batch: StepBatch, scored: dict[int, list[TokenLogprob]], pooled: dict[int, Pooled]
    ) -> tuple[Tensor, list[int]]:
        """Return the logits of the sequences that ask for tokens, a row for each token, and the indices of
        these sequences. Fills in ``scored`` and ``pooled``."""
        pools = any(work.params.pooling is not None for work in batch.sequences)
        if self.decode_steps is not None and not pools:
            logits = self.decode_steps.run(batch.sequences, batch.slot_ranks)
            if logits is not None:
                return logits, [i for i, work in enumerate(batch.sequences) if work.sample]
        inputs, asking = self._prepare(batch)
        slots, lora = self.lora_slots, inputs.sample_lora
        replaced = slots is not None and lora.segments and slots.replaces_logits(lora)
        if not pools and not replaced and not any(work.score for work in batch.sequences):
            return self.model.forward(inputs), asking
        last = self.model.layers_forward(inputs)
        self._score(batch, last, scored)
        if pools:
            pooled.update(self._pool(batch, last))
        if not asking:
            return torch.empty(0), asking
        return self.model.logits(last, inputs.sample_rows, inputs.sample_lora), asking

    def _score(self, batch: StepBatch, last: LastLayer, scored: dict[int, list[TokenLogprob]]) -> None:
        """Fill in ``scored``, in pieces: a whole prompt's logits can take more memory than the model."""
        begins = accumulate((len(work.tokens) for work in batch.sequences), initial=0)
        rows = [
            (i, begin + place, work.history[work.start + place + 1])
            for i, (work, begin) in enumerate(zip(batch.sequences, begins, strict=False))
            for place in range(work.score)
        ]
        size = max(1, PIECE_BYTES // (4 * self.spec.vocab_size))
        for piece in (rows[at : at + size] for at in range(0, len(rows), size)):
            sequences = Counter(i for i, _row, _target in piece)
            where = send([torch.tensor([row for _i, row, _target in piece])], self.model.device)[0]
            lora = self._lora_batch(batch, sequences, list(sequences.values()))
            logits = self.model.logits(last, where, lora)
            if self.group.shard.rank > 0:
                continue
            most = max(batch.sequences[i].params.prompt_logprobs or 0 for i in sequences)
            entries = token_logprobs(logits, [target for _i, _row, target in piece], most)
            for (i, _row, _target), entry in zip(piece, entries, strict=True):
                count = batch.sequences[i].params.prompt_logprobs
                scored.setdefault(i, []).append(msgspec.structs.replace(entry, top=entry.top[:count]))

    def _pool(self, batch: StepBatch, last: LastLayer) -> dict[int, Pooled]:
        slots = self.lora_slots

        def normed(rows: list[int]) -> Tensor:
            return self.model.normed(last, send([torch.tensor(rows)], self.model.device)[0])

        heads, kinds = ((), ()) if slots is None else (slots.heads, slots.poolings)
        return pool(batch.sequences, normed, heads, kinds, self.pooling)

    def _prepare(self, batch: StepBatch) -> tuple[StepInputs, list[int]]:
        """Return the step's tensors, and the indices of the sequences that ask for a token."""
        token_ids: list[int] = []
        spans: list[Span] = []
        sample_rows: list[int] = []
        asking: list[int] = []
        end = 0
        for i, work in enumerate(batch.sequences):
            tokens = work.tokens
            begin, end = end, end + len(tokens)
            spans.append(Span(begin, end - begin, work.start))
            token_ids += tokens
            if work.sample and work.params.pooling is None:
                asking.append(i)
                sample_rows += range(end - 1 - len(work.draft), end)
        ids, rows = _tensor(token_ids), _tensor(sample_rows)
        if self.model.device.type != "cpu":
            ids, rows = send([ids, rows], self.model.device)
        tables = [work.block_table for work in batch.sequences]
        lora = sample_lora = self._lora_batch(batch, range(len(spans)), [span.length for span in spans])
        if len(sample_rows) < len(token_ids):
            counts = [1 + len(batch.sequences[i].draft) for i in asking]
            sample_lora = self._lora_batch(batch, asking, counts)
        plan = AttentionPlan(spans, tables, self.kv_cache.block_size, self.model.device)
        return StepInputs(ids, rows, plan, lora, sample_lora), asking

    def _lora_batch(self, batch: StepBatch, sequences: Iterable[int], counts: list[int]) -> LoRABatch:
        """``counts`` tokens of each of ``sequences``, by index."""
        # Without slots every sequence must be a base row; LoRABatch refuses anything else.
        ranks = batch.slot_ranks if self.lora_slots is not None else ()
        affine = self.lora_slots.has_affine if self.lora_slots is not None else ()
        rows = [batch.sequences[i] for i in sequences]
        slots, scales = [work.slot for work in rows], [work.scale for work in rows]
        return LoRABatch(slots, counts, ranks, self.model.device, slot_affine=affine, scales=scales)


def _tensor(numbers: list[int]) -> Tensor:
    """Make an int64 tensor: by way of a buffer, which takes a third of the time."""
    if not numbers:
        return torch.empty(0, dtype=torch.long)
    return torch.frombuffer(array("q", numbers), dtype=torch.long)
