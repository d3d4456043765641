"""Layers of attention and a gated MLP that are recognised as a whole, and then computed in one call.

In a step of few tokens, the call computes the layers that follow, too, with the inputs that they get if
nothing comes between them. A layer that then gets other inputs is computed again.

While a layer runs by itself for the first time, its modules' work is recorded. If a layer of the CPU library
can do the same, both must give the same outputs for random inputs and for those that the layer got. Names do
not matter.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import HeadNorms, Norm, Rotation
from aioengine.kernels.cpu.adapted import AdaptedLinear
from aioengine.kernels.cpu.block import Blocks, Parts, Scratch
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
_FEW = 64
"""Tokens of a step whose layers are computed ahead. Each layer's output takes memory; and with more tokens
what is between the layers takes little of the time."""


class WholeLayers:
    """Layers that are computed in one call; :meth:`undo` lets their modules compute again."""

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

    place: str | int
    convert: Callable[[Step, int, Tensor, Tensor], Rotation | None]


class Made(NamedTuple):
    """A layer's inputs and outputs in a step."""

    hidden: Tensor
    pair: Any
    """The cosines and sines among its arguments; None: there are none."""
    output: Tensor

    def of(self, hidden: Tensor, pair: Any) -> bool:
        """Whether it is for these arguments."""
        if hidden is not self.hidden:
            return False
        if pair is None or self.pair is None:
            return pair is self.pair
        return _is_pair(pair) and all(map(operator.is_, pair, self.pair))


class LayerForward:
    """Computes a layer as a whole, once it is recognised."""

    def __init__(self, module: Any, holder: Holder, before: LayerForward | None, *, rounds: bool) -> None:
        self._own = own_forward(module)
        self._factors = [value for value in vars(module).values() if isinstance(value, float)]
        self._holder = holder
        self._rounds = rounds
        self._before = None if before is None else weakref.ref(before)
        """The layer before it, as far as is known."""
        self._after: LayerForward | None = None
        """The layer that got this one's output, and the same rotation, when both were recognised."""
        self._tried = False
        self.parts: Parts | None = None
        """None: it computes by its modules."""
        self._alone: Blocks | None = None
        self._chain: tuple[Blocks, list[LayerForward]] | None = None
        """This layer with those that follow, and these."""
        self._source: Source | None = None

    @property
    def ahead(self) -> int:
        """The number of layers that are computed together with this one, in steps of few tokens."""
        return len(self._following()[1])

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        step = self._holder.step
        if step is None or step.plan is None or not arguments:
            return self._own(*arguments, **named)
        first, self._tried = not self._tried, True
        if first:
            self._recognise(step, arguments, named)
            self._learn(step, arguments, named)
        if self.parts is None or self._alone is None:
            return self._own(*arguments, **named)
        hidden, pair = arguments[0], self._pair(arguments, named)
        ready: Made | None = step.made.get(self)
        if ready is not None and ready.of(hidden, pair):
            return ready.output
        blocks, following = self._alone, list[LayerForward]()
        if len(step.plan.positions) <= _FEW:
            blocks, following = self._following()
        outputs = self._compute(blocks, step, hidden, pair)
        if outputs is None:
            return self._own(*arguments, **named)
        if first:
            step.made[self] = Made(hidden, pair, outputs[0])
        for layer, (gets, gives) in zip(following, pairwise(outputs), strict=True):
            step.made[layer] = Made(gets, pair, gives)
        return outputs[0]

    def _pair(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._source is None:
            return None
        place = self._source.place
        if isinstance(place, str):
            return named.get(place)
        return arguments[place] if place < len(arguments) else None

    def _compute(self, blocks: Blocks, step: Step, hidden: Tensor, pair: Any) -> tuple[Tensor, ...] | None:
        """Return the layers' outputs; None if the arguments are not as they were at first."""
        assert step.plan is not None
        parts = blocks.layers[0]
        d = parts.cache.keys.shape[3]
        rotation: Rotation | None = None
        if self._source is None:
            rotation = no_rotation(step, d)
        elif _is_pair(pair):
            rotation = self._source.convert(step, d, *pair)
        tokens = len(step.plan.positions)
        if rotation is None or rotation.cos.shape != (tokens, 1, parts.half):
            return None
        scratch: Scratch | None = step.made.get(Scratch)
        if scratch is None or not scratch.has_room(blocks):
            scratch = step.made[Scratch] = Scratch(blocks, step.plan, step.lora)
        out = blocks(hidden.reshape(tokens, -1).contiguous(), rotation, scratch, step.lora)
        found: tuple[Tensor, ...] = out.view(-1, *hidden.shape).unbind()
        return found

    def _following(self) -> tuple[Blocks, list[LayerForward]]:
        if self._chain is None:
            following, layer = list[LayerForward](), self._after
            while layer is not None:
                following.append(layer)
                layer = layer._after
            parts = [one.parts for one in (self, *following) if one.parts is not None]
            self._chain = Blocks(parts), following
        return self._chain

    def _learn(self, step: Step, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Remember which layer this one follows, if it gets just what that one has given."""
        before = None if self._before is None else self._before()
        if before is None or before.parts is None or self.parts is None:
            return
        made: Made | None = step.made.get(before)
        own, its = self.parts, before.parts
        alike = own.half == its.half and own.neighbours == its.neighbours and own.head_dim == its.head_dim
        pair = self._pair(arguments, named)
        if made is None or not alike or not Made(made.output, made.pair, made.output).of(arguments[0], pair):
            return
        before._after = self
        while before is not None:
            before._chain = None
            before = None if before._before is None else before._before()

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
        candidates = [Blocks([parts]) for parts in _parts(seen, self._factors, half, neighbours) if parts.fit]
        pair = self._pair(arguments, named)
        generator = torch.Generator().manual_seed(0)
        # Small inputs show what is added to them, as norms make it large.
        scales = torch.logspace(-3, 2, hidden.shape[-2], dtype=hidden.dtype)[:, None]
        random = scales * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
        for inputs in (random, hidden):  # the pages then hold what they must
            expected = self._own(inputs, *rest, **named)
            candidates = [
                blocks
                for blocks in candidates
                if self._same(self._compute(blocks, step, inputs, pair), expected)
            ]
        if candidates:
            self._alone = candidates[0]
            self.parts = self._alone.layers[0]

    def _same(self, found: tuple[Tensor, ...] | None, expected: Tensor) -> bool:
        if found is None or not equal(found[0], expected, tolerance_of(expected.dtype, self._rounds)):
            return False
        return equal_in_size(found[0], expected)


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
