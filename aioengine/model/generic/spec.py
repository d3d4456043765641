"""Description of a model that transformers runs, without its weights. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from aioengine.errors import ConfigError
from aioengine.model.spec import KVShape, LinearShape, ModelSpec, Quantization


class Adaptable(NamedTuple):
    """A linear that adapters may target."""

    name: str
    """Path in the model, as PEFT names it."""
    layer: int
    """``NO_LAYER`` outside of the layers."""
    module: str
    """Path below the layer. All linears of one ``module`` have one shape."""
    group: str
    """Linears of a layer that are in one group read the same input."""


class GenericSpec(ModelSpec, frozen=True, kw_only=True):
    """A decoder of transformers. It does not use the fields of :class:`ModelSpec` that say how a layer
    computes, because its modules know that."""

    architecture: str
    """The class that runs it."""
    linears: tuple[Adaptable, ...]
    shapes: dict[str, LinearShape]
    """The shape of each module."""
    kv: tuple[KVShape, ...]
    """Shape of the keys and values of a token, for each layer that attends."""
    layer_ids: tuple[int, ...]
    """The numbers that transformers gives to the layers of ``kv``."""
    parameters: int
    flat: bool
    """Whether all tokens of a step go through the model at once, with the engine's attention. Otherwise each
    sequence goes through it alone, with the model's own attention over keys and values that are gathered."""
    quantizable: tuple[str, ...] = ()
    """Names of the linears that ``quantization`` is for: those whose weight may be stored in another form,
    with sizes that are multiples of 16. Others stay in the dtype; so do narrow ones, such as routers."""
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
        return self.shapes[module]

    def targets(self, asked: Sequence[str] | None) -> tuple[str, ...]:
        """Return the modules whose path ends in one of the names in ``asked``. By default all linears but the
        head, as PEFT's "all-linear" has it. Raises ConfigError for an unknown name, and if there are no
        linears."""
        if asked is None:
            found = tuple(module for module in self.shapes if module != "lm_head")
            if not found:
                raise ConfigError(
                    f"lora: {self.architecture} has no linear that an adapter may be on: one through which "
                    "each token goes once, as a row; set lora=None to run it without adapters"
                )
            return found
        chosen = tuple(m for m in self.shapes if m in asked or m.rpartition(".")[2] in asked)
        missing = [
            name for name in asked if not any(m == name or m.rpartition(".")[2] == name for m in chosen)
        ]
        if missing:
            raise ConfigError(
                f"target_modules: {self.architecture} has no linear called {', '.join(missing)} that can be "
                f"adapted; it has {', '.join(self.shapes) or 'none'}; leave target_modules out for all"
            )
        return chosen

    def layers_with(self, module: str) -> int:
        return sum(linear.module == module for linear in self.linears)

    def fused(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        groups: dict[str, tuple[str, ...]] = {}
        for linear in self.linears:
            if linear.layer == layer:
                groups[linear.group] = (*groups.get(linear.group, ()), linear.module)
        return groups

    def adaptable(self) -> Iterator[tuple[int, str]]:
        return ((linear.layer, linear.module) for linear in self.linears)

    def module_name(self, layer: int, module: str) -> str:
        """Return PEFT's name of a module. Raises KeyError if there is no such linear that adapters can
        have."""
        for linear in self.linears:
            if (linear.layer, linear.module) == (layer, module):
                return linear.name
        raise KeyError((layer, module))

    def find_module(self, name: str) -> tuple[int, str] | None:
        return next(((x.layer, x.module) for x in self.linears if x.name == name), None)

    def quantized_modules(self) -> Iterator[tuple[int, str]]:
        names = set(self.quantizable)
        return ((x.layer, x.module) for x in self.linears if x.name in names)

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
