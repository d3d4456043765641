"""Description of a model that transformers runs, without its weights. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

from aioengine.errors import ConfigError
from aioengine.model.spec import NO_LAYER, BareParameter, KVShape, LinearShape, ModelSpec, Quantization

_TO_LAYER = re.compile(r".*\.\d+\.", re.ASCII)


class Adaptable(NamedTuple):
    """A parameter that adapters may be on."""

    owner: str
    """Path of the module that has it, as PEFT names it."""
    module: str
    """Its own name: the path, or "lm_head"."""
    shape: LinearShape
    """Of the matrix, or of that of each expert."""
    parameter: str = "weight"
    bare: bool = False
    """Whether the owner is no linear, so that PEFT names the parameter: ``target_parameters``."""
    experts: int = 0
    """It has a matrix for each of so many experts; 0: it is a matrix."""
    turned: bool = False
    """Whether matrices are [in, out]."""

    @property
    def names(self) -> dict[str, str]:
        """What slots hold for it: a module for each matrix, with its name."""
        path = f"{self.owner}.{self.parameter}"
        every = {f"{self.module}.{e}": f"{path}.{e}" for e in range(self.experts)}
        return every or {self.module: self.owner}


class GenericSpec(ModelSpec, frozen=True, kw_only=True):
    """A decoder of transformers. It does not use the fields of :class:`ModelSpec` that say how a layer
    computes, because its modules know that. To adapters there are no layers: every module is by itself."""

    architecture: str
    """The class that runs it."""
    adapted: tuple[Adaptable, ...]
    """Weights of linears, and then parameters of routers and of all experts of a layer. Those of one owner
    follow each other."""
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
        return self._shapes[module]

    @cached_property
    def _shapes(self) -> dict[str, LinearShape]:
        return {module: x.shape for x in self.adapted for module in x.names}

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
        return (kind, *kind.split(".")[-2:])

    @property
    def outer_modules(self) -> tuple[str, ...]:
        return ("lm_head",) if "lm_head" in self._shapes else ()

    @property
    def layer_modules(self) -> tuple[str, ...]:
        return tuple(module for x in self.adapted if x.module != "lm_head" for module in x.names)

    @cached_property
    def _stacked(self) -> dict[str, int]:
        """The number of experts of each module that has some."""
        return {x.module: x.experts for x in self.adapted if x.experts}

    def kind_of(self, module: str) -> str:
        path = module.rpartition(".")[0]
        return _TO_LAYER.sub("", path if path in self._stacked else module)

    def is_bare(self, module: str) -> bool:
        return module in self._bare

    @cached_property
    def _bare(self) -> frozenset[str]:
        return frozenset(module for x in self.adapted if x.bare for module in x.names)

    def experts_in(self, linear: str) -> int:
        return self._stacked.get(linear, 0)

    def bare_parameters(self) -> Iterator[BareParameter]:
        for x in self.adapted:
            yield BareParameter(x.owner, x.parameter, tuple((name,) for name in x.names.values()))

    def fused(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        return {x.module: tuple(x.names) for x in self.adapted} if layer == NO_LAYER else {}

    @cached_property
    def _names(self) -> dict[tuple[int, str], str]:
        return {(NO_LAYER, module): name for x in self.adapted for module, name in x.names.items()}

    def kv_shapes(self) -> tuple[KVShape, ...]:
        return self.kv

    def num_parameters(self) -> int:
        return self.parameters

    def weights_bytes(self, dtype_bytes: int, quantization: Quantization) -> int:
        more = self.float32_parameters * max(4 - dtype_bytes, 0)
        return super().weights_bytes(dtype_bytes, quantization) + more
