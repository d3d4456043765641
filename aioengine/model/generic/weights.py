"""Weights of linears and experts packed for the compiled CPU library, in the place of parameters.

They are tensors of a kind of their own: torch's linear and embedding compute with them as they are stored,
and whatever else reads such a parameter gets a copy in the usual order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from aioengine.kernels import PlainWeight, Weight
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.model.buffer import Arena
from aioengine.model.generic.spec import GenericSpec

_INTERFACE = ("_apply_gate", "has_gate", "has_bias", "is_transposed")
"""What transformers' ``use_experts_implementation`` gives to experts."""


class StoredWeight(Tensor):
    """A packed parameter [out, in], or [in, out] (``turned``, as GPT-2's ``Conv1D`` has it); or such matrices
    of experts [experts, out, in], packed one below the other."""

    weight: PackedWeight
    turned: bool

    @classmethod
    def of(cls, like: Tensor, weight: PackedWeight, turned: bool) -> StoredWeight:
        """Return a tensor of the dtype and shape of ``like``."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: StoredWeight = make(cls, like.shape, dtype=like.dtype, device=like.device)
        made.weight, made.turned = weight, turned
        return made

    def product_with(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs [..., out] of a linear for ``x`` [..., in]."""
        weight = self.weight
        return weight.linear(x.reshape(-1, weight.k), bias).view(*x.shape[:-1], weight.n)

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the rows of an embedding."""
        return self.weight.gather(ids.flatten().long().contiguous()).view(*ids.shape, self.weight.k)

    def expanded(self) -> Tensor:
        """Return a copy in the usual order."""
        rows = self.weight.rows(0, self.weight.n).view(*self.shape[:-2], -1, self.weight.k)
        return rows.mT if self.turned else rows

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute products and look-ups with the weight as it is stored."""
        named = kwargs or {}
        if function is F.linear and isinstance(args[1], cls) and not args[1].turned:
            return args[1].product_with(args[0], args[2] if len(args) > 2 else named.get("bias"))
        if function is torch.addmm and isinstance(args[2], cls) and args[2].turned and not named:
            return args[2].product_with(args[1], args[0])
        if function is F.embedding and isinstance(args[1], cls) and not args[1].turned:
            return args[1].look_up(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares a static method
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute anything else with a copy."""
        if function is torch.ops.aten.detach.default:
            return args[0]
        args, named = tree_map(lambda x: x.expanded() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **named)


def pack_weights(model: Any, spec: GenericSpec) -> None:
    """Pack those linears and experts of a model whose sizes fit; they take as much memory as before."""
    places: dict[int, list[tuple[Any, str]]] = {}  # a tied head's parameter is the embedding's, too
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, name))
    arena = Arena()
    for x in spec.adapted:
        module = model.get_submodule(x.owner)
        own, used = getattr(module, x.parameter), not x.bare or bool(x.experts and uses_interface(module))
        n, k = own.mT.shape[-2:] if x.turned else own.shape[-2:]
        if not used or isinstance(own, StoredWeight) or not PackedWeight.fits(n, k, own.dtype):
            continue
        values = _rows(own, x.turned)
        packed = PackedWeight.pack(arena.take(own.nbytes).view(own.dtype).view(values.shape).copy_(values))
        stored = torch.nn.Parameter(StoredWeight.of(own, packed, x.turned), requires_grad=False)
        for module, name in places[id(own)]:
            setattr(module, name, stored)


def _rows(parameter: Tensor, turned: bool) -> Tensor:
    """Return the numbers, [out, in] or [experts * out, in]; a view if they are not turned."""
    own = parameter.detach()
    own = own.mT if turned else own
    return own.reshape(-1, own.shape[-1]) if own.dim() > 2 else own


def uses_interface(module: Any) -> bool:
    """Whether a module is of experts that may be computed in other ways than their own."""
    return all(hasattr(module, name) for name in _INTERFACE)


def experts_weight(module: Any, name: str) -> Weight:
    """Return the matrices [experts * out, in] of a parameter of experts, one below the other."""
    own = getattr(module, name)
    if isinstance(own, StoredWeight):
        return own.weight
    return PlainWeight(_rows(own, module.is_transposed))


def linear_matrix(module: Any) -> Tensor:
    """Return the weight [out, in] of a linear of either kind, as a view."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, torch.nn.Linear) else weight.T
