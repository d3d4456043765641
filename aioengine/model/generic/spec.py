"""Description of a model that transformers runs, without its weights. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from aioengine.errors import ConfigError
from aioengine.model.spec import BareParameter, KVShape, LinearShape, ModelSpec, Quantization


class Adaptable(NamedTuple):
    """A linear that adapters may target."""

    name: str
    """Path in the model, as PEFT names it."""
    layer: int
    """``NO_LAYER`` outside of the layers."""
    module: str
    """Path below the layer. All linears of one ``module`` have one shape."""


class Stack(NamedTuple):
    """A parameter that no linear has, but that adapters may target: PEFT's ``target_parameters``."""

    owner: str
    """Path of the module that has it, as PEFT names it."""
    parameter: str
    layer: int
    """``NO_LAYER`` outside of the layers."""
    module: str
    """Path below the layer. All parameters of one ``module`` have one shape."""
    experts: int
    """It has a matrix for each of so many experts; 0: it is the matrix of a router."""
    turned: bool
    """Whether matrices are [in, out]."""

    @property
    def modules(self) -> tuple[str, ...]:
        """What slots hold for it: a module for each matrix."""
        return tuple(f"{self.module}.{e}" for e in range(self.experts)) or (self.module,)


class GenericSpec(ModelSpec, frozen=True, kw_only=True):
    """A decoder of transformers. It does not use the fields of :class:`ModelSpec` that say how a layer
    computes, because its modules know that."""

    architecture: str
    """The class that runs it."""
    linears: tuple[Adaptable, ...]
    shapes: dict[str, LinearShape]
    """The shape of each module, and of the matrices of each stack."""
    stacks: tuple[Stack, ...] = ()
    """Parameters of routers and of all experts of a layer. Those of one module follow each other."""
    kv: tuple[KVShape, ...]
    """Shape of the keys and values of a token, for each layer that attends."""
    layer_ids: tuple[int, ...]
    """The numbers that transformers gives to the layers of ``kv``."""
    parameters: int
    flat: bool
    """Whether all tokens of a step go through the model at once, with the engine's attention. Otherwise each
    sequence goes through it alone, with the model's own attention over keys and values that are gathered."""
    float32_parameters: int = 0
    """How many of ``parameters`` are in float32 also where the model is in 16 bits."""
    native_reason: str | None = None
    """Why the native decoder does not run it; None: it was not asked."""

    @property
    def impl(self) -> str:
        return "transformers"

    @property
    def ran_by(self) -> str:
        how = "all sequences side by side" if self.flat else "a sequence at a time, with its own attention"
        why = "" if self.native_reason is None else f" (not natively: {self.native_reason})"
        return f"{self.architecture}, by transformers, {how}{why}"

    def linear(self, module: str) -> LinearShape:
        return self.shapes.get(module) or self.shapes[self.kind_of(module)]

    def targets(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """Return what :meth:`ModelSpec.targets` does; by default all linears but the head, as PEFT's
        "all-linear" has it, with routers and experts. Raises ConfigError also if there are no linears."""
        if not self.layer_modules:
            raise ConfigError(
                f"lora: {self.architecture} has no linear that an adapter may be on: one through which each "
                "token goes once, as a row; set lora=None to run it without adapters"
            )
        return super().targets(asked)

    def known_as(self, kind: str) -> tuple[str, ...]:
        path, _, last = kind.rpartition(".")
        return (kind, last, path.rpartition(".")[2]) if kind in self._stacked else (kind, last)

    @property
    def outer_modules(self) -> tuple[str, ...]:
        return ("lm_head",) if "lm_head" in self.shapes else ()

    @property
    def layer_modules(self) -> tuple[str, ...]:
        stacked = self._stacked
        found = (stacked[m].modules if m in stacked else (m,) for m in self.shapes if m != "lm_head")
        return tuple(name for names in found for name in names)

    @cached_property
    def _stacked(self) -> dict[str, Stack]:
        """One of the stacks of experts of each module."""
        return {stack.module: stack for stack in self.stacks if stack.experts}

    def kind_of(self, module: str) -> str:
        path = module.rpartition(".")[0]
        return path if path in self._stacked and module not in self.shapes else module

    def is_bare(self, module: str) -> bool:
        return module in self._bare

    @cached_property
    def _bare(self) -> frozenset[str]:
        return frozenset(module for stack in self.stacks for module in stack.modules)

    def experts_in(self, linear: str) -> int:
        return self._stacked[linear].experts if linear in self._stacked else 0

    def bare_parameters(self) -> Iterator[BareParameter]:
        for x in self.linears:
            yield BareParameter(x.name, "weight", ((x.name,),))
        for stack in self.stacks:
            names = tuple((self.module_name(stack.layer, module),) for module in stack.modules)
            yield BareParameter(stack.owner, stack.parameter, names)

    def fused(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        linears = {x.module: (x.module,) for x in self.linears if x.layer == layer}
        return linears | {stack.module: stack.modules for stack in self.stacks if stack.layer == layer}

    @cached_property
    def _names(self) -> dict[tuple[int, str], str]:
        names = {(x.layer, x.module): x.name for x in self.linears}
        for stack in self.stacks:
            path = f"{stack.owner}.{stack.parameter}"
            if not stack.experts:
                names[stack.layer, stack.module] = stack.owner
            names |= {(stack.layer, f"{stack.module}.{e}"): f"{path}.{e}" for e in range(stack.experts)}
        return names

    def kv_shapes(self) -> tuple[KVShape, ...]:
        return self.kv

    def num_parameters(self) -> int:
        return self.parameters

    def weights_bytes(self, dtype_bytes: int, quantization: Quantization) -> int:
        more = self.float32_parameters * max(4 - dtype_bytes, 0)
        return super().weights_bytes(dtype_bytes, quantization) + more

    @property
    def pair_tokens(self) -> float:
        inner = sum(
            self.shapes[x.module].in_features * self.shapes[x.module].out_features for x in self.linears
        )
        heads = sum(self.num_heads * (shape.key_dim + shape.value_dim) for shape in self.kv)
        return heads / (inner or self.parameters)
