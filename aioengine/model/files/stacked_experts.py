"""Reader of experts that a checkpoint has as one tensor for all experts of a layer, as GPT-OSS does.

Gate and up are one such tensor, in which their outputs alternate. In MXFP4 (Rouhani et al., 2023,
arXiv:2310.10537) a tensor is stored as codes of four bits and a power of two for each 32 of them; it is
expanded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import MixtureSpec

if TYPE_CHECKING:
    from torch import Tensor

_GROUP = 32
"""Codes of MXFP4 that share a scale; two of them are a byte."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes without a sign, which is the highest bit: one of mantissa, two of exponent."""
_EXPONENT_BIAS, _NAN = 127, 255
Read = Callable[[Sequence[slice]], "Tensor"]
_PARTS = ("", "_bias", "_blocks", "_scales")


class StackedExperts:
    """Splits the stacked tensors of a checkpoint into those of each expert's linears.

    The checkpoint's tensors are given to it one after the other; errors name ``where``.
    """

    def __init__(self, spec: MixtureSpec, where: str) -> None:
        self._spec, self._where = spec, where
        self._waiting: dict[str, dict[str, Tensor]] = {}
        """The parts of tensors in MXFP4 that have been found, the others not yet."""

    def pieces(self, name: str, found: tuple[int, ...], read: Read) -> Iterator[tuple[str, Tensor]] | None:
        """Return the names and values of the experts' weights or biases in the tensor ``name``; None if it is
        not one of stacked experts. ``found`` is its shape, and ``read`` reads the part that a slice for each
        dimension says. MXFP4 is returned with the last of its parts, in float32.

        Raises :class:`ConfigError`, naming the tensor, for an unexpected shape.
        """
        path, _, last = name.rpartition(".")
        stem = next((stem for stem in ("gate_up_proj", "down_proj") if last.startswith(stem)), None)
        if not path.endswith(".mlp.experts") or stem is None or last.removeprefix(stem) not in _PARTS:
            return None
        part, spec = last.removeprefix(stem), self._spec
        size, hidden = spec.expert_size, spec.hidden_size
        n, k = (2 * size, hidden) if stem == "gate_up_proj" else (hidden, size)
        shape: tuple[int, ...] = {
            "": (k, n),
            "_bias": (n,),
            "_blocks": (n, -(-k // _GROUP), _GROUP // 2),
            "_scales": (n, -(-k // _GROUP)),
        }[part]
        if found != (spec.experts, *shape):
            raise ConfigError(
                f"{self._where}: {name}: expected shape {(spec.experts, *shape)} from the "
                f"configuration, found {found}"
            )
        names = spec.names
        kinds = (names.gate, names.up) if stem == "gate_up_proj" else (names.down,)
        if part in ("", "_bias"):
            return self._plain(path, kinds, found, read, weight=not part)
        if part == "_blocks" and k % _GROUP:
            raise ConfigError(f"{self._where}: {name}: {k} inputs are no multiple of {_GROUP}")
        parts = self._waiting.setdefault(f"{path}.{stem}", {})
        parts[part] = read([slice(0, count) for count in found])
        if len(parts) < 2:
            return iter(())
        del self._waiting[f"{path}.{stem}"]
        self._check(f"{path}.{stem}", parts)
        return self._expanded(path, kinds, parts["_blocks"], parts["_scales"])

    def _check(self, name: str, parts: Mapping[str, Tensor]) -> None:
        import torch

        for part, tensor in parts.items():
            if tensor.dtype != torch.uint8:
                raise ConfigError(f"{self._where}: {name}{part}: expected torch.uint8, found {tensor.dtype}")
        if bool((parts["_scales"] == _NAN).any()):
            raise ConfigError(
                f"{self._where}: {name}_scales: a scale is not finite; the checkpoint is damaged"
            )

    def _plain(
        self, path: str, kinds: Sequence[str], found: tuple[int, ...], read: Read, *, weight: bool
    ) -> Iterator[tuple[str, Tensor]]:
        rest = [slice(0, count) for count in found[1:]]
        for expert in range(found[0]):
            values = read([slice(expert, expert + 1), *rest])[0]
            yield from _alternating(path, expert, kinds, values.T if weight else values, weight=weight)

    def _expanded(
        self, path: str, kinds: Sequence[str], blocks: Tensor, scales: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        for expert in range(len(blocks)):
            values = expand_mxfp4(blocks[expert], scales[expert])
            yield from _alternating(path, expert, kinds, values, weight=True)


def expand_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return ``blocks`` [n, groups, 16] with exponents ``scales`` [n, groups] (both uint8) as float32
    [n, 32 * groups]. Of a byte, the lower four bits come first."""
    import torch

    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(2)
    exponents = scales.int() - _EXPONENT_BIAS
    return torch.ldexp(values[codes.int()], exponents[..., None]).flatten(1)


def _alternating(
    path: str, expert: int, kinds: Sequence[str], values: Tensor, *, weight: bool
) -> Iterator[tuple[str, Tensor]]:
    """Split outputs of linears that alternate, by the names of the linears."""
    part = "weight" if weight else "bias"
    for i, kind in enumerate(kinds):
        yield f"{path}.{expert}.{kind}.{part}", values[i :: len(kinds)]
