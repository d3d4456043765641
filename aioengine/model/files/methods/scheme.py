"""What all ways to quantize a Hugging Face folder share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.errors import ConfigError
from aioengine.model.files.packing import Packing
from aioengine.model.files.stored import Stored, StoredBlocks

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F16", "BF16", "F32")


Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Shapes and types of tensors, by the last parts of their names."""


BlocksOf = Callable[[str, Mapping[str, Stored]], StoredBlocks | None]
"""One way to store the weights of linears in several tensors each: ``blocks_of(module, tensors)`` returns a
linear's weight, None if it is not quantized. ``tensors`` are its own, by the last part of their names. Raises
ConfigError for what is not supported."""


class Method:
    """A folder's way to quantize: its errors, and its weights."""

    def __init__(self, path: Path, method: str) -> None:
        self.path = path
        self.method = method

    def setting(self, key: str, value: object, what: str) -> ConfigError:
        """Make an error about a setting."""
        where = f"{self.path}/config.json: quantization_config.quant_method={self.method!r}"
        return ConfigError(f"{where}: {key}={value!r}: {what}")

    def tensor(self, name: str, what: str) -> ConfigError:
        """Make an error about a tensor."""
        return ConfigError(f"{self.path}: {name}: {what} (quant_method={self.method!r})")

    def matrix(self, name: str, header: Stored) -> tuple[int, int]:
        """Return the shape of a tensor, which must have two dimensions."""
        if len(header.shape) != 2:
            raise self.tensor(name, f"expected a matrix, found shape {header.shape}")
        return header.shape[0], header.shape[1]

    def blocks(
        self,
        module: str,
        tensors: Mapping[str, Stored],
        shape: tuple[int, int],
        packing: Packing,
        expected: Expected,
        read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    ) -> StoredBlocks:
        """Return a weight that ``read`` makes of the module's tensors. Raises ConfigError unless it has those
        ``expected``, and groups of inputs are whole bytes, and not larger than a row."""
        group, k = packing.group, shape[1]
        if group < 0 or group % 8 or group > k:
            what = f"groups of {group} inputs, of {k}, are not supported; a multiple of 8 is"
            raise self.tensor(f"{module}.weight", what)
        for kind, (form, dtypes) in expected.items():
            name, stored = f"{module}.{kind}", tensors.get(kind)
            if stored is None:
                raise self.tensor(name, "is missing")
            if stored.shape != form or stored.dtype not in dtypes:
                types = " or ".join(dtypes)
                raise self.tensor(
                    name, f"expected shape {form} of {types}, found {stored.shape} of {stored.dtype}"
                )
        return StoredBlocks(
            shape, packing, lambda: read({kind: stored.whole() for kind, stored in tensors.items()})
        )


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """Unpack unsigned codes from words of 32 bits, the lowest first: int32 [rows, words] -> uint8 [rows,
    codes]."""
    import torch

    data = packed.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), -1).flatten(1)


def integer(config: Mapping[str, Any], key: str, method: Method, default: int | None = None) -> int:
    """Return a whole number of ``quantization_config``."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise method.setting(key, value, "must be an integer")
    return value
