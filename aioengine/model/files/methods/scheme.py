"""What all ways to quantize a Hugging Face folder share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.errors import ConfigError
from aioengine.model.files.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("F16", "BF16", "F32")


class Header(NamedTuple):
    """A stored tensor, without its data."""

    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors: "F16", "I32", "F8_E4M3", ..."""


Expected = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Shapes and types of tensors, by the last parts of their names."""


class Layout(NamedTuple):
    """A quantized linear: its shape, and how it is kept in memory."""

    n: int
    k: int
    packing: Packing
    expected: Expected
    """The tensors that it must have."""
    read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Makes the tensors of a :class:`aioengine.kernels.blocks.BlockWeight`, under its names for them, of the
    linear's, by the last parts of their names. Raises ConfigError for values that cannot be."""


LayoutOf = Callable[[str, Mapping[str, Header]], Layout | None]
"""One way to store the weights of linears in several tensors each: ``layout(module, headers)`` says how a
linear is stored, None if it is not quantized. ``headers`` are its tensors, by the last part of their names.
Raises ConfigError for what is not supported."""


class CheckpointErrors:
    """Makes errors about one folder's ``quantization_config``."""

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

    def matrix(self, name: str, header: Header) -> tuple[int, int]:
        """Return the shape of a tensor, which must have two dimensions."""
        if len(header.shape) != 2:
            raise self.tensor(name, f"expected a matrix, found shape {header.shape}")
        return header.shape[0], header.shape[1]

    def check(self, module: str, headers: Mapping[str, Header], layout: Layout) -> None:
        """Raise ConfigError unless the module has the tensors of a layout, and groups of inputs are whole
        bytes, and not larger than a row."""
        group = layout.packing.group
        if group < 0 or group % 8 or group > layout.k:
            what = f"groups of {group} inputs, of {layout.k}, are not supported; a multiple of 8 is"
            raise self.tensor(f"{module}.weight", what)
        for kind, (shape, dtypes) in layout.expected.items():
            name, header = f"{module}.{kind}", headers.get(kind)
            if header is None:
                raise self.tensor(name, "is missing")
            if header.shape != shape or header.dtype not in dtypes:
                types = " or ".join(dtypes)
                raise self.tensor(
                    name, f"expected shape {shape} of {types}, found {header.shape} of {header.dtype}"
                )


def check_groups(group_of: Tensor, groups: int, name: str, wrong: CheckpointErrors) -> None:
    """Raise ConfigError unless all inputs are in one of so many groups."""
    if len(group_of) and not 0 <= int(group_of.min()) <= int(group_of.max()) < groups:
        raise wrong.tensor(name, "names groups that do not exist")


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """Unpack unsigned codes from words of 32 bits, the lowest first: int32 [rows, words] -> uint8 [rows,
    codes]."""
    import torch

    data = packed.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), -1).flatten(1)


def integer(config: Mapping[str, Any], key: str, wrong: CheckpointErrors, default: int | None = None) -> int:
    """Return a whole number of ``quantization_config``."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong.setting(key, value, "must be an integer")
    return value
