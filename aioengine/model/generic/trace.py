"""Trace of one pass of a model: what its modules get, and what its layers put into the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from aioengine.model.generic.step import EngineCache, KeepsMore, PassingLayer, run
from aioengine.model.spec import KVShape

NAME = "aioengine-trace"
_TOKENS = 7
_PAST = 3
"""Tokens in the cache of a model that attends by itself, before those of the pass: so a module that gets the
whole past is told from others."""


@dataclass
class Trace:
    """One pass of some tokens."""

    attended: dict[int, KVShape] = field(default_factory=dict)
    """Arguments of the attention that transformers lets others replace, by layer."""
    odd: bool = False
    """Whether the engine's attention cannot be that: a layer calls it twice, or with a mask of its own."""
    updated: dict[int, KVShape] = field(default_factory=dict)
    """Keys and values that were put into the cache, by layer."""
    widths: dict[str, set[int]] = field(default_factory=dict)
    """Sizes of the rows that each linear, and each module with other matrices, got for each token; 0 for a
    call of another kind."""
    routed: set[str] = field(default_factory=set)
    """Modules that got the tokens with two values for each: the numbers and weights of its experts."""

    @property
    def flat(self) -> bool:
        """Whether the model's attention can be the engine's."""
        return bool(self.attended) and not self.odd and set(self.updated) <= set(self.attended)

    @property
    def kept(self) -> dict[int, KVShape]:
        """What is to be cached, by layer."""
        return self.attended if self.flat else self.updated

    def sees_all(self, name: str) -> bool:
        """Whether a module got every token as a row, in every call."""
        return bool(self.widths.get(name)) and 0 not in self.widths[name]


def is_linear(module: Any) -> bool:
    """Whether PEFT's "all-linear" means this module."""
    return isinstance(module, (torch.nn.Linear, Conv1D))


def has_matrices(module: Any) -> bool:
    """Whether a module that is no linear has a parameter of two or three dimensions, as routers and stacked
    experts do."""
    if is_linear(module) or isinstance(module, torch.nn.Embedding):
        return False
    return any(one.dim() in (2, 3) for one in module.parameters(recurse=False))


class Implementations:
    """Ways in which a model attends and computes experts: those that transformers chose, or others."""

    def __init__(self, model: Any) -> None:
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._own = [
            (config, name, getattr(config, name))
            for config in configs.values()
            for name in ("_attn_implementation", "_experts_implementation")
            if hasattr(config, name)
        ]

    def use(self, *, attention: str | None, experts: str | None) -> None:
        """Let the model use what is registered under these names; None: what transformers chose."""
        for config, name, own in self._own:
            asked = attention if name == "_attn_implementation" else experts
            setattr(config, name, own if asked is None else asked)


def observe(model: Any, *, own_attention: bool) -> Trace:
    """Run ``model``, which is on the device "meta", with its own attention or with one that looks at its
    inputs. If it cannot run so, it gets values, for code that chooses by them, and runs again.

    Raises whatever the model does if it cannot run with them either.
    """
    try:
        return _observe(model, own_attention)
    except KeepsMore:
        raise
    except Exception:  # whatever a model does on tensors without data
        if next(model.parameters()).device.type != "meta":
            raise
    _give_values(model)
    return _observe(model, own_attention)


def _observe(model: Any, own_attention: bool) -> Trace:
    trace, masks = Trace(), list[Tensor]()
    device = next(model.parameters()).device
    past = _PAST if own_attention else 0

    class Layer(PassingLayer):  # type: ignore[no-untyped-call] # transformers has no types for its base
        def __init__(self, number: int) -> None:
            super().__init__(past)
            self._number = number

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            trace.updated[self._number] = _shape(key_states, value_states)
            self.length = past + key_states.shape[-2]
            return _behind(past, key_states), _behind(past, value_states)

    def mask(*_: Any, **__: Any) -> Tensor:
        masks.append(torch.zeros(1, 1, 1, 1, device=device))
        return masks[-1]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *_: Any, **__: Any
    ) -> Any:
        trace.odd |= attention_mask is not None and not any(attention_mask is one for one in masks)
        trace.odd |= module.layer_idx in trace.attended
        trace.attended[module.layer_idx] = _shape(key, value)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, mask)
    # Experts choose by values, which are not there: they give nothing.
    ALL_EXPERTS_FUNCTIONS.register(NAME, lambda _module, hidden, *_, **__: torch.zeros_like(hidden))
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    ids = torch.zeros(_TOKENS, dtype=torch.long, device=device)
    cache = EngineCache(layers=[Layer(i) for i in range(layers)])
    positions = torch.arange(past, past + _TOKENS, device=device)
    implementations = Implementations(model)
    implementations.use(attention=None if own_attention else NAME, experts=NAME)
    try:
        with torch.no_grad(), _watched(model, trace), device, _Equal():
            run(model, ids, positions, cache)
    finally:
        implementations.use(attention=None, experts=None)
    return trace


def _give_values(model: Any) -> None:
    """Replace all tensors of a model by ones with values. Those of a tensor are equal, so that it takes no
    memory."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    """By the ids of the tensors that they replace, which are kept: ids of those that are gone come again."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, old in tensors.items():
                if not isinstance(old, Tensor):
                    continue
                if id(old) not in made:
                    floats = old.is_floating_point()
                    dtype, number = (torch.float32, 1 / 128) if floats else (old.dtype, 0)
                    new = torch.full((), number, dtype=dtype, device="cpu").expand(old.shape)
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=False)
                    made[id(old)] = old, new
                tensors[name] = made[id(old)][1]


class _Equal(TorchFunctionMode):
    """Computes linears whose weight is one value everywhere without expanding it."""

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        named = named or {}
        if function is torch.nn.functional.linear and len(arguments) >= 2:
            x, weight, *bias = arguments
            if weight.device.type != "meta" and not any(weight.stride()):
                first = weight[(0,) * weight.dim()]
                y = (x.sum(-1, keepdim=True) * first).expand(*x.shape[:-1], len(weight)).contiguous()
                shift = named.get("bias", bias[0] if bias else None)
                return y if shift is None else y + shift
        return function(*arguments, **named)


@contextmanager
def _watched(model: Any, trace: Trace) -> Iterator[None]:
    def saw(name: str, linear: bool) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
            x = arguments[0] if arguments and isinstance(arguments[0], Tensor) else torch.empty(0, 1)
            usual = x.numel() == _TOKENS * x.shape[-1] > 0
            if linear:
                usual = usual and isinstance(output, Tensor) and len(arguments) == 1
            elif [_count(one) for one in arguments] == [_TOKENS] * 3:
                trace.routed.add(name)
            trace.widths.setdefault(name, set()).add(x.shape[-1] if usual else 0)

        return hook

    handles = [
        module.register_forward_hook(saw(name, is_linear(module)))
        for name, module in model.named_modules()
        if is_linear(module) or has_matrices(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count(value: Any) -> int:
    """Return the number of rows of a matrix; 0 if it is none."""
    return len(value) if isinstance(value, Tensor) and value.dim() == 2 else 0


def _behind(past: int, x: Tensor) -> Tensor:
    """Return ``x`` [..., tokens, size] with the past's tokens, of zeros, in front."""
    return torch.cat([x.new_zeros(*x.shape[:-2], past, x.shape[-1]), x], dim=-2)


def _shape(key: Tensor, value: Tensor) -> KVShape:
    return KVShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3])
