"""Where everything lies inside an adapter slot: what planning, loading and the pool share. No torch here.

A slot is one row of elements. First come the LoRA matrices; the As of a fused linear adjoin, so that one
product shrinks for all of its slices. Then comes what DoRA and ``lora_bias`` need, for every output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aioengine.errors import ConfigError
from aioengine.model.spec import EMBEDDING_MODULES, NO_LAYER, TARGETABLE_MODULES, LinearShape, ModelSpec

FUSED_MODULES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The linears of a layer and the modules that each fuses, in the order of its output columns."""


class Place(NamedTuple):
    """One module of one layer: its shape, and offsets in elements from the beginning of the slot."""

    shape: LinearShape
    a: int
    """[max_rank, in]"""
    b: int
    """[out, max_rank]"""
    affine: int
    """[2, out]: gain and shift; see :meth:`aioengine.kernels.dispatch.LoRABackend.lora_affine`."""


class FusedPlace(NamedTuple):
    """One linear of the decoder, or an embedding, with the modules that slots hold for it."""

    layer: int
    name: str
    modules: tuple[str, ...]
    columns: tuple[int, ...]
    """The first output column of each module."""


class SlotLayout:
    """The layout of a slot for ``modules`` (of ``TARGETABLE_MODULES``), each with room for ``max_rank``.

    Raises :class:`ConfigError` for a module that cannot be targeted.
    """

    def __init__(self, spec: ModelSpec, max_rank: int, modules: Iterable[str]) -> None:
        targets = set(modules)
        if unknown := sorted(targets - set(TARGETABLE_MODULES)):
            raise ConfigError(
                f"target_modules: {unknown} cannot be targeted; allowed: {', '.join(TARGETABLE_MODULES)}"
            )
        self.spec = spec
        self.max_rank = max_rank
        self.modules = tuple(m for m in TARGETABLE_MODULES if m in targets)
        self.fused = tuple(self._fused_places())
        self.places: dict[tuple[int, str], Place] = {}
        self.matrix_elements = sum(self.matrix_elements_by_module.values())
        """Elements of the LoRA matrices, which begin the slot."""
        matrices, affine = 0, self.matrix_elements
        for fused in self.fused:
            shapes = [spec.linear(module) for module in fused.modules]
            b = matrices + sum(max_rank * shape.in_features for shape in shapes)
            for module, shape in zip(fused.modules, shapes, strict=True):
                self.places[fused.layer, module] = Place(shape, matrices, b, affine)
                matrices += max_rank * shape.in_features
                b += max_rank * shape.out_features
                affine += 2 * shape.out_features
            matrices = b
        self.elements = affine
        """Elements of a slot."""

    def _fused_places(self) -> Iterable[FusedPlace]:
        for module in self.modules:
            if module in EMBEDDING_MODULES:
                yield FusedPlace(NO_LAYER, module, (module,), (0,))
        for layer in range(self.spec.num_layers):
            for name, members in FUSED_MODULES.items():
                columns, column = {}, 0
                for module in members:
                    columns[module] = column
                    column += self.spec.linear(module).out_features
                held = tuple(m for m in members if m in self.modules)
                if held:
                    yield FusedPlace(layer, name, held, tuple(columns[m] for m in held))

    @property
    def matrix_elements_by_module(self) -> dict[str, int]:
        """One slot's A and B elements by module: layers x max_rank x (in + out)."""
        return {m: self._layers(m) * self.max_rank * sum(self.spec.linear(m)) for m in self.modules}

    @property
    def affine_elements(self) -> int:
        """One slot's elements for DoRA and biases: two for every output of every module."""
        return self.elements - self.matrix_elements

    def _layers(self, module: str) -> int:
        return 1 if module in EMBEDDING_MODULES else self.spec.num_layers

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SlotLayout):
            return NotImplemented
        return self is other or (
            (self.max_rank, self.modules, self.spec) == (other.max_rank, other.modules, other.spec)
        )

    __hash__ = None  # type: ignore[assignment]
