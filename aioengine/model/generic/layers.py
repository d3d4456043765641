"""Layers of attention and a gated MLP that are recognised as a whole, and then computed in one call.

While a layer runs by itself for the first time, what its modules do is noted. If that can be a layer of the
CPU library, both must make the same of random inputs and of those that the layer got; names do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import HeadNorms, Norm, Rotation
from aioengine.kernels.cpu.adapted import AdaptedLinear
from aioengine.kernels.cpu.block import Block, Parts, Scratch
from aioengine.kernels.cpu.packed import DTYPES
from aioengine.model.generic.attention import Attended, no_rotation
from aioengine.model.generic.packing import PackedLinear
from aioengine.model.generic.recognised import (
    GatedForward,
    equal,
    equal_in_size,
    own_forward,
    tolerance_of,
)
from aioengine.model.generic.step import Holder, Step

_ORDER = re.compile("(n?)l(nn)?al(n?n?)g(n?)")
"""Norm, linear, norms of queries and keys, attention, linear, norms, gated MLP, norm."""
_LETTERS = {Norm: "n", PackedLinear: "l", Attended: "a", GatedForward: "g"}
_LANES = 16


class WholeLayers:
    """Modules that compute as a whole what they do; :meth:`undo` takes it back."""

    def __init__(self, modules: dict[str, Any], holder: Holder, *, rounds: bool) -> None:
        self._changed: list[Any] = []
        attentions = {name.rpartition(".")[0] for name, m in modules.items() if hasattr(m, "layer_idx")}
        gated = [name for name, m in modules.items() if isinstance(vars(m).get("forward"), GatedForward)]
        before: LayerForward | None = None
        for name in gated:
            parent = name.rpartition(".")[0]
            if parent in attentions and "forward" not in vars(modules[parent]):
                before = modules[parent].forward = LayerForward(
                    modules[parent], holder, before, rounds=rounds
                )
                self._changed.append(modules[parent])

    def undo(self) -> None:
        """Let the modules compute as before."""
        for module in self._changed:
            del module.forward
        self._changed.clear()


class Source(NamedTuple):
    """Where a layer's arguments have the cosines and sines of its rotation."""

    name: str | int
    convert: Callable[[Step, int, Tensor, Tensor], Rotation | None]


class LayerForward:
    """Computes a layer as a whole, once it is recognised."""

    def __init__(self, module: Any, holder: Holder, before: LayerForward | None, *, rounds: bool) -> None:
        self._before = before
        """The layer before it, as far as is known."""
        self._own = own_forward(module)
        self._factors = [value for value in vars(module).values() if isinstance(value, float)]
        self._holder = holder
        self._rounds = rounds
        self._tried = False
        self.block: Block | None = None
        """None: it computes by its modules."""
        self._source: Source | None = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        step = self._holder.step
        if step is None or step.plan is None or not arguments:
            return self._own(*arguments, **named)
        if not self._tried:
            self._tried = True
            self._recognise(step, arguments, named)
        if self.block is None:
            return self._own(*arguments, **named)
        found = self._compute(self.block, step, arguments, named)
        return self._own(*arguments, **named) if found is None else found

    def _compute(
        self, block: Block, step: Step, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> Tensor | None:
        """Return the layer's output; None if its arguments are not as they were at first."""
        assert step.plan is not None
        hidden: Tensor = arguments[0]
        parts, d = block.parts, block.parts.cache.keys.shape[3]
        rotation: Rotation | None
        if self._source is None:
            rotation = no_rotation(step, d)
        else:
            place, convert = self._source
            pair: Any = arguments[place] if isinstance(place, int) else named.get(place)
            rotation = convert(step, d, *pair) if _is_pair(pair) else None
        tokens = len(step.plan.positions)
        if rotation is None or rotation.cos.shape != (tokens, 1, parts.half):
            return None
        scratch: Scratch | None = step.made.get(Scratch)
        if scratch is None or not scratch.has_room(parts):
            scratch = step.made[Scratch] = Scratch(parts, step.plan, step.lora)
        out = hidden.reshape(tokens, -1).clone(memory_format=torch.contiguous_format)
        block(out, rotation, scratch, step.lora)
        return out.view(hidden.shape)

    def _recognise(self, step: Step, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden, *rest = arguments
        seen = self._holder.seen = []
        try:
            output = self._own(*arguments, **named)
        finally:
            self._holder.seen = None
        if not isinstance(output, Tensor) or output.shape != hidden.shape or hidden.dtype not in DTYPES:
            return
        found = next((one for one in seen if isinstance(one, Attended)), None)
        if found is None or any(size % _LANES for size in found.cache.keys.shape[1:4:2]):
            return
        half = found.head_dim // 2
        if found.turn is not None:
            half = found.turn.rotation.cos.shape[-1]
            place = _place_of(found.turn.by, arguments, named)
            if place is None:
                return
            self._source = Source(place, found.turn.convert)
        neighbours = found.turn is not None and found.turn.rotation.neighbours
        candidates = [Block(parts) for parts in _parts(seen, self._factors, half, neighbours) if parts.fit]
        generator = torch.Generator().manual_seed(0)
        # Small inputs show what is added to them, as norms make it large.
        scales = torch.logspace(-3, 2, hidden.shape[-2], dtype=hidden.dtype)[:, None]
        random = scales * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
        for inputs in (random, hidden):  # the pages then hold what they must
            expected = self._own(inputs, *rest, **named)
            candidates = [
                block
                for block in candidates
                if self._same(self._compute(block, step, (inputs, *rest), named), expected)
            ]
        self.block = candidates[0] if candidates else None
        if self.block is not None and self._before is not None and self._before.block is not None:
            self._before.block.lead_to(self.block)

    def _same(self, found: Tensor | None, expected: Tensor) -> bool:
        if found is None or not equal(found, expected, tolerance_of(expected.dtype, self._rounds)):
            return False
        return equal_in_size(found, expected)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(x, Tensor) for x in value)


def _place_of(
    pair: tuple[Tensor, Tensor], arguments: tuple[Any, ...], named: dict[str, Any]
) -> str | int | None:
    """Return the argument that is ``pair``."""
    places: Iterable[tuple[str | int, Any]] = chain(enumerate(arguments), named.items())
    for place, value in places:
        if _is_pair(value) and value[0] is pair[0] and value[1] is pair[1]:
            return place
    return None


def _parts(seen: list[Any], factors: list[float], half: int, neighbours: bool) -> Iterator[Parts]:
    """Yield the layers that may have done what was ``seen``."""
    match = _ORDER.fullmatch("".join(_LETTERS.get(type(one), "?") for one in seen))
    if match is None:
        return
    before, heads, between, after = ([seen[i] for i in range(*match.span(g))] for g in (1, 2, 3, 4))
    products = [one for one in seen if isinstance(one, PackedLinear)]
    (attended,) = (one for one in seen if isinstance(one, Attended))
    (gated,) = (one for one in seen if isinstance(one, GatedForward))
    linears: dict[str, AdaptedLinear] = {}
    for name, product in zip(
        ("qkv", "o", "gate_up", "down"), (*products, gated.gate_up, gated.down), strict=True
    ):
        if product.adapted is None:
            return
        linears[name] = product.adapted
    head_norms = None
    if heads:
        if heads[0][1:] != heads[1][1:]:
            return
        head_norms = HeadNorms(heads[0].weight, heads[1].weight, *heads[0][1:])
    norms: list[tuple[Norm | None, Norm | None]] = [(None, None)]
    if len(between) == 1:  # of what attention gives, or before the MLP
        norms = [(None, between[0]), (between[0], None)]
    elif between:
        norms = [(between[0], between[1])]
    for attention_norm, mlp_input_norm in norms:
        for factor in (1.0, *factors):
            yield Parts(
                **linears,
                input_norm=before[0] if before else None,
                attention_norm=attention_norm,
                mlp_input_norm=mlp_input_norm,
                mlp_norm=after[0] if after else None,
                head_norms=head_norms,
                heads=attended.heads,
                cache=attended.cache,
                scores=attended.scores,
                half=half,
                neighbours=neighbours,
                activation=gated.activation,
                residual_scale=factor,
            )
