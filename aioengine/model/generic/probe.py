"""Probe that compares a model's logits here with those of transformers alone, once, when it is loaded.

Two sequences run through the engine's pages: in chunks, side by side, token by token, and with a third one at
the last position. Their logits must equal those of a separate uncached pass of each. A random adapter beside
a base row must pass the same test.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.kernels import AttentionPlan, LoRABatch, Span
from aioengine.model.generic.classes import one_line
from aioengine.model.generic.model import GenericModel
from aioengine.model.generic.step import KeepsMore, Unsuitable
from aioengine.model.model import StepInputs
from aioengine.model.slots.image import build_image

logger = logging.getLogger("aioengine")

_LENGTHS = (21, 13)
_TYPICAL = {torch.float32: 2e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
"""Largest median error of the rows, relative to a row's largest logit."""
_LARGEST = {torch.float32: 2e-3, torch.float16: 0.3, torch.bfloat16: 0.6}
"""Largest error of any row, relative to its largest logit. It is larger, because the last bit of a router's
input may send a token to another expert."""
_SPARED = 10
"""With experts, in 16 bits, one row of so many may have any error: if each token has but one expert, another
one changes everything."""


def check(model: GenericModel) -> None:
    """Try the ways in which the model can run, side by side first, and keep the first that is right. Raises
    ConfigError if none is."""
    problems: list[str] = []
    with torch.inference_mode():
        probe = _Probe(model)
        for flat in (True, False) if model.spec.flat else (False,):
            model.use_flat(flat)
            problem = probe.difference() or (probe.difference_with_adapter() if model.adapters else None)
            if problem is None:
                return
            logger.info("%s: %s; the next way is tried", model.spec.architecture, problem)
            problems.append(problem)
    # What a way gets wrong says more than why another one cannot be gone at all.
    problem = next((one for one in problems if "logits" in one), problems[-1])
    raise ConfigError(
        f"{model.path}: {model.spec.architecture} does not compute the same over the engine's cache and "
        f"batches as in one separate pass: {problem}. It is not served, because its answers would be wrong"
    )


class _Probe:
    """Sequences, with their block tables and the logits that the model itself has for them."""

    def __init__(self, model: GenericModel) -> None:
        self.model = model
        size, blocks = model.cache.block_size, model.cache.num_blocks
        lengths = [min(length, model.holder.longest - 1) for length in _LENGTHS]
        needed = [-(-length // size) for length in lengths]
        if sum(needed) + 1 > blocks:  # only one where there is no room for two
            lengths = [min(lengths[0], (blocks - 1 or 1) * size)]
            needed = [-(-length // size) for length in lengths]
        free = list(range(blocks))  # from the end: an adapter may have the beginning of the same memory
        self.tables = [[free.pop() for _ in range(count)] for count in needed]
        self.spare = free[0] if free else None
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.spec.vocab_size
        self.sequences = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
        try:
            self.expected = [model.alone(tokens) for tokens in self.sequences]
        except Exception as error:
            raise ConfigError(
                f"{model.path}: {model.spec.architecture} cannot run by itself: {one_line(error)}"
            ) from error
        self._check_finite()
        model.pack()  # after that, so it is compared with what transformers makes of the weights as they were

    def _check_finite(self) -> None:
        """Raise ConfigError if not all logits of the model itself are numbers, with the parameter that is the
        cause."""
        model = self.model
        if all(bool(one.isfinite().all()) for one in self.expected):
            return
        parameters = model.model.named_parameters()
        damaged = next((name for name, one in parameters if not one.isfinite().all()), None)
        why = f"they overflow in {model.dtype}" if damaged is None else f"{damaged} has values that are not"
        raise ConfigError(
            f"{model.path}: the logits of {model.spec.architecture} are not finite ({why}): the checkpoint "
            "is damaged, or needs another dtype"
        )

    def difference(self) -> str | None:
        """Return what differs from the model itself; None if nothing does."""
        return self._differs([-1] * len(self.sequences), [], self.expected)

    def difference_with_adapter(self) -> str | None:
        """Return the same for an adapter in slot 0, beside a base row."""
        model = self.model
        assert model.slots is not None
        rank = _write_random_adapter(model)
        if len(self.sequences) < 2 or rank == 0:
            return None
        with model.adapters.plainly():
            expected = [self.expected[0], model.alone(self.sequences[1])]
        found = self._differs([-1, 0], [rank] + [0] * (model.slots.max_loras - 1), expected)
        return None if found is None else f"with an adapter, {found}"

    def _differs(self, slots: list[int], ranks: list[int], expected: list[Tensor]) -> str | None:
        """Return what differs in chunks, side by side and token by token, for adapters in these slots."""
        lengths = [len(tokens) for tokens in self.sequences]
        first, rest = lengths[0] - 2, [length - 2 for length in lengths[1:]]
        steps = [[first // 2] + [0] * len(rest), [first - first // 2, *rest]]
        steps += [[1] * len(lengths)] * 2
        try:
            found = self._run(steps, slots, ranks)
        except (Unsuitable, KeepsMore) as error:
            return str(error)
        except Exception as error:  # whatever a model's modules do to inputs that they were not made for
            logger.debug("the probe failed", exc_info=True)
            return one_line(error)
        off = self._off(found, expected)
        return None if off is None else f"logits {off}"

    def _run(self, steps: list[list[int]], slots: list[int], ranks: list[int]) -> list[Tensor]:
        """Return the logits of each sequence, whose adapters are in ``slots``, in steps of so many tokens of
        each. Somebody is at the last position beside them, whose own logits mean nothing."""
        model, found = self.model, [list[Tensor]() for _ in self.sequences]
        begins = [0] * len(self.sequences)
        for counts in steps:
            who = [i for i, count in enumerate(counts) if count]
            work = [
                (self.sequences[i][begins[i] : begins[i] + counts[i]], begins[i], self.tables[i], slots[i])
                for i in who
            ]
            beside = self.spare is not None
            if self.spare is not None:
                width = -(-model.holder.longest // model.cache.block_size)
                work.insert(0, ([0], model.holder.longest - 1, [self.spare] * width, -1))
            logits = model.forward(_inputs_of(model, work, ranks))
            parts = torch.split(logits, [len(tokens) for tokens, *_ in work])[beside:]
            for i, part in zip(who, parts, strict=True):
                found[i].append(part)
                begins[i] += counts[i]
        return [torch.cat(parts) for parts in found]

    def _off(self, found: list[Tensor], expected: list[Tensor]) -> str | None:
        """Return how far logits are off; None if that is rounding."""
        right = torch.cat(expected).float()
        scale = right.abs().amax(-1).clamp(min=1e-6)
        error = (torch.cat(found).float() - right).abs().amax(-1) / scale
        routed = any(x.bare for x in self.model.spec.adapted) and self.model.dtype != torch.float32
        spared = len(error) // _SPARED if routed else 0
        typical, largest = float(error.median()), float(error.sort()[0][len(error) - 1 - spared])
        if typical <= _TYPICAL[self.model.dtype] and largest <= _LARGEST[self.model.dtype]:
            return None
        return f"are off by {largest:.2g} of the largest one"


def _write_random_adapter(model: GenericModel) -> int:
    """Put an adapter on everything into slot 0, and return its rank; 0 if the slots have no room for it."""
    assert model.slots is not None
    layout = model.slots.layout
    generator = torch.Generator().manual_seed(0)
    for rank in (min(layout.max_rank, 8), 1):
        tensors = {}
        for key, place in layout.places.items():
            n_in, n_out = place.shape
            a = torch.randn(rank, n_in, generator=generator) * n_in**-0.5
            b = torch.randn(n_out, rank, generator=generator) * 0.1
            tensors[key] = a.to(model.slots.dtype), b.to(model.slots.dtype)
        adapter: Any = SimpleNamespace(rank=rank, tensors=tensors, digest="")
        image = build_image(layout, adapter, {}, model.slots.dtype)
        if image.nbytes <= model.slots.nbytes:
            model.slots.write(0, image)
            if model.slots.copier is not None:
                model.slots.copier.before_step()
            return rank
    return 0


def _inputs_of(
    model: GenericModel, work: list[tuple[list[int], int, list[int], int]], ranks: list[int]
) -> StepInputs:
    """Return a step in which all tokens' logits are wanted. ``work``: each sequence's new tokens, where they
    start, its block table and slot, sorted by slot."""
    ids: list[int] = []
    spans = []
    for tokens, start, _, _ in work:
        spans.append(Span(len(ids), len(tokens), start))
        ids += tokens
    device = model.device
    slots, counts = [slot for *_, slot in work], [len(tokens) for tokens, *_ in work]
    lora = LoRABatch(slots, counts, ranks, device)
    return StepInputs(
        token_ids=torch.tensor(ids, device=device),
        sample_rows=torch.arange(len(ids), device=device),
        attention=AttentionPlan(spans, [table for _, _, table, _ in work], model.cache.block_size, device),
        lora=lora,
        sample_lora=lora,
    )
