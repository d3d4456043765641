"""The CPU adapter cache's memory: adapters by uid. Who comes and goes is the core's decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from aioengine.model.parallel import SOLO, Shard
from aioengine.model.slot_layout import SlotLayout
from aioengine.model.spec import NO_LAYER, ModelSpec

if TYPE_CHECKING:
    import torch

    from aioengine.adapters.peft import PackedAdapter
    from aioengine.model.slot_image import AdapterImage


class BaseWeights(Protocol):
    """:meth:`aioengine.model.decoder.Decoder.base_weight`."""

    def __call__(
        self, layer: int, module: str, *, all_rows: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class AdapterStore:
    """``weights`` gives the base model's linears, which DoRA needs; ``dtype`` is that of the slots.

    With a ``shard`` of several, it keeps that share of every adapter, as the slots of its rank hold it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_rank: int,
        target_modules: Sequence[str],
        dtype: torch.dtype,
        weights: BaseWeights,
        pin_memory: bool = False,
        allow_nonfinite: bool = False,
        shard: Shard = SOLO,
    ) -> None:
        from aioengine.adapters.alike import KnownContents  # imports torch

        self._known = KnownContents()
        self._spec = spec
        self._layout = SlotLayout(spec, max_rank, target_modules, shard)
        self._dtype = dtype
        self._weights = weights
        self._pin_memory = pin_memory
        self._allow_nonfinite = allow_nonfinite
        self._images: dict[int, AdapterImage] = {}

    def read(self, name: str, path: str) -> AdapterImage:
        """Read and validate an adapter. Blocking: called in a loader thread, and keeps nothing.

        Raises the adapter errors of :func:`aioengine.adapters.peft.read_adapter`.
        """
        from aioengine.adapters.dora import output_affine  # these import torch
        from aioengine.adapters.packing import SlotOrder
        from aioengine.adapters.peft import read_adapter
        from aioengine.model.slot_image import build_image

        packed = read_adapter(
            name,
            path,
            self._spec,
            max_rank=self._layout.max_rank,
            target_modules=self._layout.modules,
            dtype=self._dtype,
            allow_nonfinite=self._allow_nonfinite,
            base_weight=self._embedding,
            order=SlotOrder(self._layout, self._pin_memory) if self._layout.shard.size == 1 else None,
            known=self._known,
        )
        if self._layout.shard.size > 1:
            return self._share(packed)
        affine = output_affine(packed, self._weights, self._dtype)
        return build_image(self._layout, packed, affine, self._dtype, pin_memory=self._pin_memory)

    def _share(self, packed: PackedAdapter) -> AdapterImage:
        from aioengine.adapters.dora import output_affine
        from aioengine.adapters.shares import computed_outputs, held_matrices
        from aioengine.model.slot_image import build_image

        affine = output_affine(computed_outputs(self._layout, packed), self._weights, self._dtype)
        held = held_matrices(self._layout, packed)
        return build_image(self._layout, held, affine, self._dtype, pin_memory=self._pin_memory)

    def _embedding(self, module: str) -> torch.Tensor:
        """[vocabulary, hidden]"""
        weight, _ = self._weights(NO_LAYER, module, all_rows=True)
        return weight.T if module == "embed_tokens" else weight

    def put(self, uid: int, image: AdapterImage) -> None:
        """Keep an adapter that has been read."""
        self._images[uid] = image

    def get(self, uid: int) -> AdapterImage:
        return self._images[uid]

    def drop(self, uid: int) -> None:
        """Free its memory. (A copy under way keeps what it reads alive.)"""
        del self._images[uid]

    def clear(self) -> None:
        """Free everything, the base model's weights included; nothing can be read any more."""
        self._images.clear()
        self._weights = _no_weights

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self._images.values())

    def __len__(self) -> int:
        return len(self._images)


def _no_weights(
    layer: int, module: str, *, all_rows: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    raise RuntimeError(f"the base model's {module} of layer {layer} is gone: the engine has stopped")
