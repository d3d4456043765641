"""Probe that compares a model's logits here with those of transformers alone, once, when it is loaded.

Two sequences run through the engine's pages: in chunks, side by side, token by token, and with a third one at
the last position. Their logits must equal those of a separate uncached pass of each. A random adapter beside
a base row must pass the same test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.kernels import LoRAPool
from aioengine.model.generic.attention import Unsuitable
from aioengine.model.generic.caches import KeepsMore
from aioengine.model.generic.classes import one_line
from aioengine.model.generic.model import GenericModel, inputs_of
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
    """Try the ways in which the model can run, the fast ones first, and keep the first that is right.

    Raises ConfigError, naming the layer that differs first.
    """
    with torch.inference_mode():
        try:
            with _expanded(model):
                expected = [_alone(model, tokens) for tokens in _sequences(model)[0]]
        except Exception as error:
            raise ConfigError(
                f"{model.path}: {model.spec.architecture} cannot run by itself: {one_line(error)}"
            ) from error
        _check_finite(model, expected)
        problem: str | None = None
        problems: list[str] = []
        for way in model.ways():
            model.take(way)
            problem = _differs(model, expected)
            if problem is None and (model.hooks or model.bare_hooks):
                problem = _adapter_differs(model)
            if problem is None:
                break
            logger.info("%s: %s; the next way is tried", model.spec.architecture, problem)
            problems.append(problem)
    if problem is not None:
        # What a way gets wrong says more than why another one cannot be gone at all.
        problem = next((one for one in problems if "logits" in one), problem)
        raise ConfigError(
            f"{model.path}: {model.spec.architecture} does not compute the same over the engine's cache and "
            f"batches as in one separate pass: {problem}. It is not served, because its answers would be "
            "wrong"
        )


def _check_finite(model: GenericModel, logits: list[Tensor]) -> None:
    """Raise ConfigError if not all logits of the model itself are numbers, with the parameter that is the
    cause. What stands for a packed weight is no number either: who reads it is found by the comparison."""
    if all(bool(one.isfinite().all()) for one in logits):
        return
    parameters = list(model.model.named_parameters())
    stored = [(name, one) for name, one in parameters if any(one.stride())]
    damaged = next((name for name, one in stored if not one.isfinite().all()), None)
    if damaged is None and len(stored) < len(parameters):
        return
    why = f"they overflow in {model.dtype}" if damaged is None else f"{damaged} has values that are not"
    raise ConfigError(
        f"{model.path}: the logits of {model.spec.architecture} are not finite ({why}): the checkpoint is "
        "damaged, or needs another dtype"
    )


def _tokens(model: GenericModel, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.spec.vocab_size, (count,), generator=generator).tolist()


def _sequences(model: GenericModel) -> tuple[list[list[int]], list[list[int]]]:
    """Return tokens and block tables; only one sequence where there is no room for two."""
    size, blocks = model.cache.block_size, model.cache.num_blocks
    lengths = [min(length, model.longest - 1) for length in _LENGTHS]
    needed = [-(-length // size) for length in lengths]
    if sum(needed) + 1 > blocks:
        lengths = [min(lengths[0], (blocks - 1 or 1) * size)]
        needed = [-(-length // size) for length in lengths]
    free = list(range(blocks))  # from the end: an adapter may have the beginning of the same memory
    tables = [[free.pop() for _ in range(count)] for count in needed]
    return [_tokens(model, length, seed) for seed, length in enumerate(lengths)], tables


def _differs(model: GenericModel, expected: list[Tensor]) -> str | None:
    """Return what differs from ``expected``, the sequences' logits; None if nothing does."""
    sequences, tables = _sequences(model)
    found: list[list[Tensor]] = [[] for _ in sequences]
    try:
        for counts in _schedule(model, [len(tokens) for tokens in sequences]):
            _step(model, sequences, tables, counts, found)
    except (Unsuitable, KeepsMore) as error:
        return str(error)
    except Exception as error:  # whatever a model's modules do to inputs that they were not made for
        logger.debug("the probe failed", exc_info=True)
        return one_line(error)
    off = _off(model, torch.cat([torch.cat(rows) for rows in found]), torch.cat(expected))
    if off is None:
        return None
    return f"logits {off}, first in {_first_layer(model, sequences[0], tables[0])}"


def _schedule(model: GenericModel, lengths: list[int]) -> Iterator[list[int]]:
    """Return how many tokens of each sequence a step takes: chunks, then chunks side by side, then single
    tokens."""
    first = lengths[0] - 2
    yield [first // 2] + [0] * (len(lengths) - 1)
    yield [first - first // 2] + [length - 2 for length in lengths[1:]]
    yield [1] * len(lengths)
    yield [1] * len(lengths)


def _step(
    model: GenericModel,
    sequences: list[list[int]],
    tables: list[list[int]],
    counts: list[int],
    found: list[list[Tensor]],
) -> None:
    work: list[tuple[list[int], int, list[int], int]] = []
    who = []
    for i, count in enumerate(counts):
        if count:
            start = sum(len(rows) for rows in found[i])
            work.append((sequences[i][start : start + count], start, tables[i], -1))
            who.append(i)
    used = {block for table in tables for block in table}
    spare = next((block for block in range(model.cache.num_blocks) if block not in used), None)
    if spare is not None:  # somebody at the last position, whose own logits mean nothing
        width = -(-model.longest // model.cache.block_size)
        work.append(([0], model.longest - 1, [spare] * width, -1))
    logits = model.forward(inputs_of(model, work, []))
    begin = 0
    for i, (tokens, *_) in zip(who, work, strict=False):
        found[i].append(logits[begin : begin + len(tokens)])
        begin += len(tokens)


def _alone(model: GenericModel, tokens: list[int]) -> Tensor:
    """Compute logits [n, vocab] in one pass, as transformers does."""
    model.use_own_attention(True)
    try:
        out = model.model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    finally:
        model.use_own_attention(not model.way.flat)
    logits: Tensor = (out[0] if isinstance(out, tuple) else out.logits)[0]
    return logits


def _off(model: GenericModel, found: Tensor, expected: Tensor) -> str | None:
    scale = expected.float().abs().amax(-1).clamp(min=1e-6)
    error = (found.float() - expected.float()).abs().amax(-1) / scale
    spared = len(error) // _SPARED if model.spec.stacks and _precision(model) != torch.float32 else 0
    typical, largest = float(error.median()), float(error.sort()[0][len(error) - 1 - spared])
    if typical <= _TYPICAL[_precision(model)] and largest <= _LARGEST[_precision(model)]:
        return None
    return f"are off by {largest:.2g} of the largest one"


def _precision(model: GenericModel) -> torch.dtype:
    """Return the dtype whose rounding is as coarse as what the model's linears do."""
    return torch.bfloat16 if model.rounds else model.dtype


def _first_layer(model: GenericModel, tokens: list[int], table: list[int]) -> str:
    """Return the first numbered module whose output differs."""
    split = len(tokens) - 2
    with _outputs(model.model) as alone:
        _alone(model, tokens)
    with _outputs(model.model) as first:
        model.forward(inputs_of(model, [(tokens[:split], 0, table, -1)], []))
    with _outputs(model.model) as second:
        model.forward(inputs_of(model, [(tokens[split:], split, table, -1)], []))
    for name, output in alone.items():
        if name not in first or name not in second:
            continue
        both = torch.cat([first[name], second[name]], dim=1)
        if both.shape != output.shape:
            continue
        error = (both.float() - output.float()).abs().max() / output.float().abs().max().clamp(min=1e-6)
        if not float(error) <= _TYPICAL[_precision(model)]:
            return name
    return "a batch of several sequences"


@contextmanager
def _outputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Return the outputs [1, tokens, size] of the modules whose names end in a number, in the order of
    calls."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def saw(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.dim() == 3:
                seen[name] = hidden.clone()

        return saw

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if name.rpartition(".")[2].isdecimal()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _adapter_differs(model: GenericModel) -> str | None:
    """Return the same for an adapter in slot 0, beside a base row."""
    assert model.slots is not None
    sequences, tables = _sequences(model)
    rank = _write_random_adapter(model)
    if len(sequences) < 2 or rank == 0:
        return None
    try:
        with _plainly(model):
            expected = [_alone(model, sequences[1])]
        expected.insert(0, _alone(model, sequences[0]))
        found = _in_two_steps(model, sequences, tables, [rank] + [0] * (model.slots.max_loras - 1))
    except Exception as error:
        return f"with an adapter: {one_line(error)}"
    off = _off(model, torch.cat(found), torch.cat(expected))
    return None if off is None else f"with an adapter, logits {off}"


def _in_two_steps(
    model: GenericModel, sequences: list[list[int]], tables: list[list[int]], ranks: list[int]
) -> list[Tensor]:
    """Return the logits of two sequences, of which the second one has the adapter in slot 0."""
    found: list[list[Tensor]] = [[], []]
    cuts = [len(tokens) // 2 for tokens in sequences]
    for parts in ([slice(0, cut) for cut in cuts], [slice(cut, None) for cut in cuts]):
        work = [
            (sequences[i][part], part.start, tables[i], slot)
            for i, (part, slot) in enumerate(zip(parts, (-1, 0), strict=True))
        ]
        logits = model.forward(inputs_of(model, work, ranks))
        lengths = [len(tokens) for tokens, *_ in work]
        for rows, of in zip(found, torch.split(logits, lengths), strict=True):
            rows.append(of)
    return [torch.cat(rows) for rows in found]


@dataclass
class _RandomAdapter:
    """Random adapter, with what slots read of one."""

    rank: int
    tensors: dict[tuple[int, str], tuple[Tensor, Tensor]]
    digest: str = ""


def _write_random_adapter(model: GenericModel) -> int:
    """Put an adapter on everything into slot 0, and return its rank; 0 if the slots have no room for it."""
    assert model.slots is not None
    layout = model.slots.layout
    generator = torch.Generator().manual_seed(0)
    for rank in (min(layout.max_rank, 8), 1):
        tensors = {}
        for (layer, module), place in layout.places.items():
            n_in, n_out = place.shape
            a = torch.randn(rank, n_in, generator=generator) * n_in**-0.5
            b = torch.randn(n_out, rank, generator=generator) * 0.1
            tensors[layer, module] = a.to(model.slots.dtype), b.to(model.slots.dtype)
        image = build_image(layout, _RandomAdapter(rank, tensors), {}, model.slots.dtype)
        if image.nbytes <= model.slots.nbytes:
            model.slots.write(0, image)
            model.slots.before_step()
            return rank
    return 0


@contextmanager
def _expanded(model: GenericModel) -> Iterator[None]:
    """Context in which quantized weights are expanded, and multiplied by torch."""
    model.holder.expanded = True
    try:
        yield
    finally:
        model.holder.expanded = False


@contextmanager
def _plainly(model: GenericModel) -> Iterator[None]:
    """Add the adapter in slot 0 to all rows, as two products."""

    def add(pool: LoRAPool, place: int, x: Tensor, y: Tensor) -> Tensor:
        a = pool.a(0, place)
        b = pool.b(0, place).to(a.dtype)  # it may be whole numbers
        return y + ((x.to(a.dtype) @ a.T) @ b.T).to(y.dtype)

    for one in model.hooks:
        one.plain = add
    for bare in model.bare_hooks:
        bare.plain = True
    try:
        with _expanded(model):
            yield
    finally:
        for one in model.hooks:
            one.plain = None
        for bare in model.bare_hooks:
            bare.plain = False
