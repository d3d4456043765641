"""Linears of a model on the CPU library: their weights are rearranged for it, one after the other.

Those that read the same input are one product, for the base model and for its adapters: the first of them
that is called makes the outputs of all.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aioengine.kernels import Backend
from aioengine.kernels.cpu.adapted import AdaptedLinear, fits
from aioengine.kernels.cpu.matrix import LibraryWeight
from aioengine.kernels.cpu.packed import PackedWeight
from aioengine.kernels.weight import linear_by_rows
from aioengine.model.generic.adapted.linears import AdaptedForward, base_weight, storable
from aioengine.model.generic.quantized import LibraryForms, embed, stub
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.generic.step import Holder, Step


class Outputs(NamedTuple):
    """Outputs that the first member of a group has computed for the others."""

    x: Tensor
    step: Step | None
    y: Tensor
    """[T, all outputs]"""


class PackedLinear:
    """One linear, or several that read the same input, with the adapters on them."""

    def __init__(
        self,
        weight: LibraryWeight,
        modules: Sequence[Any],
        hooks: Sequence[AdaptedForward | None],
        holder: Holder,
        kernels: Backend,
    ) -> None:
        """``weight`` is that of all ``modules``, one below the other."""
        both = [base_weight(module) for module in modules]
        weights = [weight for weight, _ in both]
        self.columns = list(pairwise(accumulate((len(weight) for weight in weights), initial=0)))
        self.weight = weight
        self.bias: Tensor | None = None
        if any(bias is not None for _, bias in both):
            parts = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in both]
            self.bias = torch.cat(parts)
        self._hooks = [hook for hook in hooks if hook is not None]
        self._pool = self._hooks[0].pool if self._hooks else None
        usual = self._pool is not None and fits(self._pool, self.weight.dtype)
        self.adapted: AdaptedLinear | None = None
        """Both in one call; None if the library does not add such adapters."""
        if usual or self._pool is None:
            self.adapted = AdaptedLinear(self.weight, self.bias, self._pool)
        self._holder = holder
        self._kernels = kernels
        self._made: Outputs | None = None
        self._uses = 0

    @property
    def is_plain(self) -> bool:
        """Whether the probe adds the adapters in its own way."""
        return any(hook.plain is not None for hook in self._hooks)

    def base(self, x: Tensor) -> Tensor:
        """Return the outputs without adapters: [T, all outputs]."""
        rows = x.reshape(-1, x.shape[-1])
        if self._holder.expanded and not isinstance(self.weight, PackedWeight):
            return linear_by_rows(rows, self.weight, self.bias)
        return self.weight.linear(rows, self.bias)

    def outputs(self, x: Tensor) -> Tensor:
        """Return the outputs with the adapters of the step: [T, all outputs]."""
        step, made = self._holder.step, self._made
        if made is None or made.x is not x or made.step is not step:
            made = self._made = Outputs(x, step, self.whole(x))
            self._uses = 0
        self._uses += 1
        if self._uses == len(self.columns):
            self._made = None
        return made.y

    def rows(self, x: Tensor) -> Tensor:
        """Return ``x`` [..., in] as [T, in], contiguous. Raises RuntimeError if these are not the step's
        tokens."""
        step, rows = self._holder.step, x.reshape(-1, self.weight.k).contiguous()
        if step is not None and step.lora.segments and len(rows) != step.lora.num_tokens:
            tokens = step.lora.num_tokens
            raise RuntimeError(f"a linear got {len(rows)} rows of {tokens} tokens")
        return rows

    def whole(self, x: Tensor) -> Tensor:
        """Return :meth:`outputs` for a caller that takes all of them."""
        step, pool, kernels = self._holder.step, self._pool, self._kernels
        if self._holder.seen is not None:
            self._holder.seen.append(self)
        if step is None or pool is None or not step.lora.segments:
            return self.base(x)
        rows = self.rows(x)
        if self.adapted is not None:
            return self.adapted(rows, step.lora)
        y = self.base(rows)
        kernels.lora_expand(kernels.lora_shrink(rows, pool, step.lora), pool, y, step.lora)
        if step.lora.affine:
            kernels.lora_affine(y, pool, step.lora)
        return y


class Member:
    """Takes the place of one linear's ``forward``."""

    def __init__(self, packed: PackedLinear, place: int, hook: AdaptedForward | None) -> None:
        self.packed = packed
        self._begin, self._end = packed.columns[place]
        self.hook = hook

    def __call__(self, x: Tensor) -> Tensor:
        plain = None if self.hook is None else self.hook.plain
        y = self.packed.base(x) if plain is not None else self.packed.outputs(x)
        own = y[:, self._begin : self._end].view(*x.shape[:-1], self._end - self._begin)
        if plain is None or self.hook is None:
            return own
        return plain(self.hook.pool, self.hook.place, x, own)

    def weight(self) -> Tensor:
        """Copy of the weight: [out, in]."""
        return self.packed.weight.rows(self._begin, self._end)

    def bias(self) -> Tensor | None:
        bias = self.packed.bias
        return None if bias is None else bias[self._begin : self._end]

    def shown(self, weight: Tensor) -> Tensor:
        """Return what is to stand in the place of the module's ``weight``: of its dtype and shape, but of use
        only to the library."""
        packed = self.packed.weight
        if not isinstance(packed, PackedWeight):
            return stub(weight)
        return packed.data[self._begin * packed.k : self._end * packed.k].view(weight.shape)


class PackedLinears:
    """Linears of a model that have been packed together; :meth:`undo` takes it back."""

    def __init__(
        self,
        modules: dict[str, Any],
        spec: GenericSpec,
        hooks: Sequence[AdaptedForward],
        holder: Holder,
        kernels: Backend,
        forms: LibraryForms,
    ) -> None:
        """Pack those linears of the spec that can be: usual ones, with a weight of their own. ``forms``
        says which are quantized."""
        can, by_name = storable(modules), {hook.name: hook for hook in hooks}
        self.by_name: dict[str, Member] = {}
        self._modules = modules
        self.nbytes_added = 0
        """Bytes that the weights take more than before; below zero if they take fewer."""
        self._embeddings: list[Any] = []
        groups: dict[tuple[int, str], list[str]] = {}
        for linear in spec.linears:
            groups.setdefault((linear.layer, linear.group), []).append(linear.name)
        for names in groups.values():
            if any(name not in can for name in names):
                continue
            weights = [base_weight(modules[name])[0] for name in names]
            if not all(PackedWeight.fits(len(w), w.shape[1], w.dtype) for w in weights):
                continue
            embeddings = [one for name in names for one in can[name]]
            own = [by_name.get(name) for name in names]
            form = forms.pack(names, weights)
            packed = PackedLinear(form, [modules[name] for name in names], own, holder, kernels)
            self.nbytes_added += form.nbytes - sum(weight.nbytes for weight in weights)
            del weights
            for place, (name, hook) in enumerate(zip(names, own, strict=True)):
                member = self.by_name[name] = Member(packed, place, hook)
                module = modules[name]
                module.forward = member
                module.weight.data = member.shown(module.weight.data)
            for embedding in embeddings:
                embedding.forward = functools.partial(embed, packed.weight)
                self._embeddings.append(embedding)

    def undo(self) -> None:
        """Let all modules compute by themselves again."""
        for name, member in self.by_name.items():
            module, weight = self._modules[name], member.weight()
            usual = isinstance(module, torch.nn.Linear)
            module.weight.data = weight if usual else weight.T.contiguous()
            own: Callable[..., Tensor] = functools.partial(type(module).forward, weakref.proxy(module))
            module.forward = own if member.hook is None else member.hook
        for embedding in self._embeddings:
            del embedding.forward
        self.by_name.clear()
