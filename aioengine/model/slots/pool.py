"""The pre-allocated adapter slots on the device, laid out for the fused linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.model.buffer import Buffer
from aioengine.model.parallel.group import SOLO, Shard
from aioengine.model.slots.copy import SerialCopier, SlotCopier, StreamCopier
from aioengine.model.slots.image import AdapterImage
from aioengine.model.slots.layout import FusedPlace, SlotLayout
from aioengine.model.spec import NO_LAYER, ModelSpec


class FusedLoRA(NamedTuple):
    """The pool of one fused linear with n targeted slices, as views: S slots, maximum rank R.

    Under tensor parallelism these are shares; see :mod:`aioengine.model.slots.layout`.
    """

    modules: tuple[str, ...]
    a: Tensor
    """[S, n * R, in]"""
    b: tuple[Tensor, ...]
    """n tensors [S, out, R]"""
    affine: tuple[Tensor, ...]
    """n tensors [S, 2, out]: each output's gain and shift, zero where there is no DoRA and no bias."""
    offsets: tuple[int, ...]
    """First output column of each slice in the fused linear."""
    b_offsets: tuple[int, ...]
    """First output column that each B adds to: the same, unless B is a share of a slice's outputs."""


class LoRASlots:
    """``max_loras`` slots of ``max_rank``, for ``target_modules`` (of ``TARGETABLE_MODULES``).

    ``layers[i]`` maps the fused linear's name ("qkv", "o", "gate_up", "down") to its pool, and ``outer``
    does the same for "embed_tokens" and "lm_head". All pools are views of one row of memory a slot.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_loras: int,
        max_rank: int,
        target_modules: Iterable[str],
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = SOLO,
    ) -> None:
        self.layout = SlotLayout(spec, max_rank, target_modules, shard)
        self.max_loras = max_loras
        if device.type == "cpu":
            memory = Buffer(max_loras * self.layout.elements * dtype.itemsize).tensor
            self._rows = memory.view(dtype).view(max_loras, self.layout.elements)
        else:
            self._rows = torch.zeros(max_loras, self.layout.elements, dtype=dtype, device=device)
        self._copier: SlotCopier = StreamCopier(device) if device.type == "cuda" else SerialCopier()
        self._extents: list[Mapping[int, int] | None] = [{}] * max_loras
        """What of each slot may be other than zero; None: anything."""
        self._has_affine = [False] * max_loras

        self.outer: dict[str, FusedLoRA] = {}
        self.layers: list[dict[str, FusedLoRA]] = [{} for _ in range(spec.num_layers)]
        for fused in self.layout.fused:
            pools = self.outer if fused.layer == NO_LAYER else self.layers[fused.layer]
            pools[fused.name] = self._pool(fused)

    def _pool(self, fused: FusedPlace) -> FusedLoRA:
        def view(offset: int, rows: int, width: int) -> Tensor:
            return self._rows[:, offset : offset + rows * width].view(self.max_loras, rows, width)

        places = [self.layout.places[fused.layer, module] for module in fused.modules]
        return FusedLoRA(
            fused.modules,
            view(places[0].a, len(places) * places[0].a_rank, places[0].shape.in_features),
            tuple(view(place.b, place.shape.out_features, place.b_rank) for place in places),
            tuple(view(place.affine, 2, place.num_outputs) for place in places),
            fused.columns,
            fused.b_columns,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._rows.dtype

    @property
    def nbytes(self) -> int:
        """Bytes allocated for all slots."""
        return self._rows.nbytes

    @property
    def nbytes_by_module(self) -> dict[str, int]:
        """Bytes of the LoRA matrices of each targeted module, all layers and slots together."""
        size = self.max_loras * self._rows.element_size()
        return {m: n * size for m, n in self.layout.matrix_elements_by_module.items()}

    @property
    def has_affine(self) -> list[bool]:
        """For each slot: does its adapter scale or shift outputs (DoRA, ``lora_bias``)?"""
        return self._has_affine

    def before_step(self) -> None:
        """To be called by the thread that is about to enqueue a step."""
        self._copier.before_step()

    def after_step(self) -> None:
        """Orders writes after a step that has just been enqueued; called on the step's thread and stream."""
        self._copier.after_step()

    def write(self, slot: int, image: AdapterImage) -> None:
        """Puts an adapter into a slot, and zeroes what another left of the slot that this does not cover.

        Called in one thread, while steps may read *other* slots. Raises :class:`ConfigError`, before a
        byte is written, if the slot does not exist or the image was made for other slots. If it fails
        later, the slot holds nothing that may be read until a write into it succeeds.
        """
        if not 0 <= slot < self.max_loras:
            raise ConfigError(f"slot {slot}: there are max_loras={self.max_loras} slots")
        if image.layout != self.layout:
            raise ConfigError(
                "the adapter was prepared for slots of another model, max_lora_rank or target_modules"
            )
        before = self._extents[slot]
        self._extents[slot] = None
        covered = before is not None and (
            before == image.extent
            or all(image.extent.get(offset, 0) >= size for offset, size in before.items())
        )
        self._copier.write(self._rows[slot], image, zero=not covered)
        self._extents[slot] = image.extent
        self._has_affine[slot] = image.has_affine
