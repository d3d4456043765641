"""Weights of linears and experts in the engine's forms, packed or quantized, in the place of parameters.

They are tensors of a kind of their own: torch's linear and embedding compute with the form as it is stored,
and whatever else reads such a parameter gets its numbers expanded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from aioengine.errors import ConfigError
from aioengine.kernels import PlainWeight, Weight
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.cpu.blocks import PackedBlocks
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.cpu.quantized import QuantizedWeight
from aioengine.kernels.cpu.shared_library import has_int8_products
from aioengine.kernels.portable.quantize import quantize
from aioengine.kernels.weight import PIECE_ELEMENTS, linear_by_rows
from aioengine.model.buffer import Arena
from aioengine.model.files.packing import Packing
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.generic.step import Holder
from aioengine.model.spec import Quantization

_INTERFACE = ("_apply_gate", "has_gate", "has_bias", "is_transposed")
"""What transformers' ``use_experts_implementation`` gives to experts."""


class StoredWeight(Tensor):
    """A parameter [out, in], or [in, out] (``turned``, as GPT-2's ``Conv1D`` has it), in any form; or such
    matrices of experts [experts, out, in], which the form has one below the other."""

    weight: Weight
    turned: bool
    holder: Holder

    @classmethod
    def of(
        cls, like: Tensor, weight: Weight, turned: bool, device: torch.device, holder: Holder
    ) -> StoredWeight:
        """Return a tensor of the dtype and shape of ``like``."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: StoredWeight = make(cls, like.shape, dtype=like.dtype, device=device)
        made.weight, made.turned, made.holder = weight, turned, holder
        return made

    def product_with(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the outputs [..., out] of a linear for ``x`` [..., in]."""
        weight = self.weight
        linear = linear_by_rows if self.holder.expanded else self.holder.kernels.linear
        return linear(x.reshape(-1, weight.k), weight, bias).view(*x.shape[:-1], weight.n)

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the rows of an embedding."""
        return self.weight.gather(ids.flatten().long().contiguous()).view(*ids.shape, self.weight.k)

    def expanded(self) -> Tensor:
        """Return a copy of the numbers."""
        rows = self.weight.rows(0, self.weight.n).view(*self.shape[:-2], -1, self.weight.k)
        return rows.mT if self.turned else rows

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute products and look-ups with the form as it is."""
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
        """Compute anything else with the expanded numbers."""
        if function is torch.ops.aten.detach.default:
            return args[0]
        args, named = tree_map(lambda x: x.expanded() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **named)


class _Matrix(NamedTuple):
    """A parameter that may be stored in another form."""

    name: str
    """That of a linear, or of a parameter of experts."""
    module: Any
    parameter: str
    turned: bool

    @property
    def values(self) -> Tensor:
        """The numbers, [out, in] or [experts * out, in]; a view if they are not turned."""
        own: Tensor = getattr(self.module, self.parameter).detach()
        own = own.mT if self.turned else own
        return own.reshape(-1, own.shape[-1]) if own.dim() > 2 else own


class StoredWeights:
    """The linears and experts of a model whose weights are in a form of the engine's."""

    def __init__(
        self, model: Any, spec: GenericSpec, holder: Holder, device: torch.device, quantization: Quantization
    ) -> None:
        """Store those that the spec packs, in blocks on ``device``; and with the CPU library all others whose
        sizes fit, with ``quantization`` where the spec allows it. The rest moves to the device."""
        self._spec, self._holder, self._device = spec, holder, device
        self._library = holder.kernels.name == "cpu"
        self._quantized = set() if quantization == "none" else set(spec.quantizable)
        self._form = Int4Weight if quantization == "int4" else QuantizedWeight
        self.rounds = self._library and bool(self._quantized) and has_int8_products()
        """Whether linears round their inputs to int8."""
        places: dict[int, list[tuple[Any, str]]] = {}  # a tied head's parameter is the embedding's, too
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                places.setdefault(id(parameter), []).append((module, name))
        matrices = list(_matrices(model, spec))
        sizes = [size for matrix in matrices if (size := self._packed_bytes(matrix)) is not None]
        self._arena = Arena(sum(sizes), len(sizes)) if sizes else None
        for matrix in matrices:
            own = getattr(matrix.module, matrix.parameter)
            weight = None if isinstance(own, StoredWeight) else self._weight(matrix)
            if weight is not None:
                stored = StoredWeight.of(own, weight, matrix.turned, device, holder)
                for module, name in places[id(own)]:
                    setattr(module, name, torch.nn.Parameter(stored, requires_grad=False))
        model._apply(lambda x: x if isinstance(x, StoredWeight) else x.to(device))

    def _packed_bytes(self, matrix: _Matrix) -> int | None:
        """Return what a matrix takes in a form of the CPU library; None: it has none there."""
        own = getattr(matrix.module, matrix.parameter)
        n, k = own.mT.shape[-2:] if matrix.turned else own.shape[-2:]
        if not self._library or matrix.name in self._spec.packed or not PackedWeight.fits(n, k, own.dtype):
            return None
        return self._form.packed_bytes(n, k) if matrix.name in self._quantized else own.nbytes

    def _weight(self, matrix: _Matrix) -> Weight | None:
        """Return the form of a matrix; None: it stays as it is."""
        if matrix.name in self._spec.packed:
            blocks = blocks_of(matrix.name, self._spec.packed[matrix.name], matrix.values, self._device)
            return PackedBlocks.pack([blocks]) if self._library else blocks
        nbytes = self._packed_bytes(matrix)
        if nbytes is None or self._arena is None:
            return None
        memory, values = self._arena.take(nbytes), matrix.values
        if matrix.name in self._quantized:
            return self._form.pack(values.contiguous(), memory, int8_activations=self.rounds)
        return PackedWeight.pack(memory.view(values.dtype).view(values.shape).copy_(values))


def _matrices(model: Any, spec: GenericSpec) -> Iterator[_Matrix]:
    for linear in spec.linears:
        module = model.get_submodule(linear.name)
        yield _Matrix(linear.name, module, "weight", not isinstance(module, torch.nn.Linear))
    for stack in spec.stacks:
        module = model.get_submodule(stack.owner)
        if stack.experts and uses_interface(module):
            yield _Matrix(f"{stack.owner}.{stack.parameter}", module, stack.parameter, stack.turned)


def uses_interface(module: Any) -> bool:
    """Whether a module is of experts that may be computed in other ways than their own."""
    return all(hasattr(module, name) for name in _INTERFACE)


def experts_weight(module: Any, name: str) -> Weight:
    """Return the matrices [experts * out, in] of a parameter of experts, one below the other."""
    own = getattr(module, name)
    return (
        own.weight
        if isinstance(own, StoredWeight)
        else PlainWeight(_Matrix(name, module, name, module.is_transposed).values)
    )


def stored_bytes(parameter: Tensor) -> int:
    """Return the bytes that a parameter takes."""
    return parameter.weight.nbytes if isinstance(parameter, StoredWeight) else parameter.nbytes


def linear_matrix(module: Any) -> Tensor:
    """Return the weight [out, in] of a linear of either kind, as a view."""
    weight: Tensor = module.weight.detach()
    return weight if isinstance(module, torch.nn.Linear) else weight.T


def blocks_of(name: str, packing: Packing, weight: Tensor, device: torch.device) -> BlockWeight:
    """Quantize ``weight`` [n, k] onto ``device``, some rows at a time. Raises ConfigError if a value is not
    finite."""
    k = weight.shape[1]
    group = packing.group or k
    made: list[Mapping[str, Tensor]] = [
        quantize(packing.format, rows.to(device).float(), group)
        for rows in torch.split(weight, max(1, PIECE_ELEMENTS // k))
    ]
    tensors = {key: torch.cat([piece[key] for piece in made]) for key in made[0]}
    if not bool(tensors["scale"].isfinite().all()):
        raise ConfigError(f"{name}.weight: a value is not finite; the checkpoint is damaged")
    return BlockWeight(
        packing.format,
        k=k,
        dtype=weight.dtype,
        group=group,
        middle=packing.middle,
        rounds=packing.rounds,
        **tensors,
    )
