"""What a checkpoint has under a name, of which nothing is read yet. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from aioengine.model.files.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor


class Stored(NamedTuple):
    """A tensor."""

    shape: tuple[int, ...]
    read: Callable[[Sequence[slice]], Tensor]
    """Reads a part: a slice for each dimension."""
    dtype: str = ""
    """Name of its dtype in a safetensors file: "F16", "I32", "F8_E4M3", ..."""

    def whole(self) -> Tensor:
        """Read all of it."""
        return self.read([slice(0, n) for n in self.shape])


class StoredBlocks(NamedTuple):
    """A quantized weight."""

    shape: tuple[int, ...]
    packing: Packing
    read: Callable[[], Mapping[str, Tensor]]
    """Reads the tensors of a :class:`aioengine.kernels.blocks.BlockWeight`, under its names for them. Raises
    ConfigError for values that cannot be."""


Checkpoint = dict[str, Stored | StoredBlocks]
"""The parameters of a model by their Hugging Face names."""
