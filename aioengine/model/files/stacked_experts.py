"""Reader of experts that a checkpoint has as one tensor for all experts of a layer, as GPT-OSS does.

Gate and up are one such tensor, in which their outputs alternate. In MXFP4 (Rouhani et al., 2023,
arXiv:2310.10537) a tensor is stored as codes of four bits and a power of two for each 32 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.packing import MXFP4, Packing

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[Sequence[slice]], "Tensor"]
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_PARTS = ("", "_bias", "_blocks", "_scales")
_NAN = 255
"""The exponent that is none."""


def packed_experts(names: Iterable[str], spec: MixtureSpec) -> dict[str, Packing]:
    """Return the experts' linears that are in MXFP4, by name, of a checkpoint that has tensors of these
    ``names``."""
    found: dict[str, Packing] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        stem = last.removesuffix("_blocks")
        if path.endswith(".mlp.experts") and stem != last and stem in (_GATE_UP, _DOWN):
            for expert in range(spec.experts):
                found |= {f"{path}.{expert}.{kind}": MXFP4 for kind in _kinds(stem, spec)}
    return found


class StackedExperts:
    """Splits the stacked tensors of a checkpoint into those of each expert's linears.

    The checkpoint's tensors are given to it one after the other; errors name ``where``.
    """

    def __init__(self, spec: MixtureSpec, where: str) -> None:
        self._spec, self._where = spec, where
        self._waiting: dict[str, dict[str, Tensor]] = {}
        """The parts of tensors in MXFP4 that have been found, the others not yet."""

    def pieces(
        self, name: str, found: tuple[int, ...], read: Read
    ) -> Iterator[tuple[str, Tensor | dict[str, Tensor]]] | None:
        """Return the names and values of the experts' weights or biases in the tensor ``name``; None if it is
        not one of stacked experts. ``found`` is its shape, and ``read`` reads the part that a slice for each
        dimension says. Weights in MXFP4 are returned with the last of their parts, as the tensors of a
        :class:`aioengine.kernels.blocks.BlockWeight`.

        Raises :class:`ConfigError`, naming the tensor, for an unexpected shape.
        """
        path, _, last = name.rpartition(".")
        stem = next((stem for stem in (_GATE_UP, _DOWN) if last.startswith(stem)), None)
        if not path.endswith(".mlp.experts") or stem is None or last.removeprefix(stem) not in _PARTS:
            return None
        part, spec = last.removeprefix(stem), self._spec
        size, hidden = spec.expert_size, spec.hidden_size
        n, k = (2 * size, hidden) if stem == _GATE_UP else (hidden, size)
        shape: tuple[int, ...] = {
            "": (k, n),
            "_bias": (n,),
            "_blocks": (n, MXFP4.groups(k), MXFP4.group // 2),
            "_scales": (n, MXFP4.groups(k)),
        }[part]
        if found != (spec.experts, *shape):
            raise ConfigError(
                f"{self._where}: {name}: expected shape {(spec.experts, *shape)} from the "
                f"configuration, found {found}"
            )
        kinds = _kinds(stem, spec)
        if part in ("", "_bias"):
            return self._plain(path, kinds, found, read, weight=not part)
        if part == "_blocks" and k % MXFP4.group:
            raise ConfigError(f"{self._where}: {name}: {k} inputs are no multiple of {MXFP4.group}")
        parts = self._waiting.setdefault(f"{path}.{stem}", {})
        parts[part] = read([slice(0, count) for count in found])
        if len(parts) < 2:
            return iter(())
        del self._waiting[f"{path}.{stem}"]
        self._check(f"{path}.{stem}", parts)
        return _packed(path, kinds, parts["_blocks"], parts["_scales"])

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


def _kinds(stem: str, spec: MixtureSpec) -> tuple[str, ...]:
    """The linears whose outputs alternate in a tensor."""
    names = spec.names
    return (names.gate, names.up) if stem == _GATE_UP else (names.down,)


def _packed(
    path: str, kinds: Sequence[str], blocks: Tensor, scales: Tensor
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for expert in range(len(blocks)):
        data, exponents = blocks[expert].flatten(1), scales[expert]
        pairs = zip(
            _alternating(path, expert, kinds, data, weight=True),
            _alternating(path, expert, kinds, exponents, weight=True),
            strict=True,
        )
        for (name, codes), (_, scale) in pairs:
            yield name, {"data": codes, "scale": scale}


def _alternating(
    path: str, expert: int, kinds: Sequence[str], values: Tensor, *, weight: bool
) -> Iterator[tuple[str, Tensor]]:
    """Split outputs of linears that alternate, by the names of the linears."""
    part = "weight" if weight else "bias"
    for i, kind in enumerate(kinds):
        yield f"{path}.{expert}.{kind}.{part}", values[i :: len(kinds)]
