"""Checks the values of a file's tensors, and packs them for a slot: scaled, in the slots' dtype, in one
buffer in a slot's order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aioengine.adapters.peft.contents import Contents, Matrices, SlotOrder
from aioengine.adapters.peft.folder import AdapterFolder
from aioengine.adapters.peft.folding.embeddings import TOKEN_KINDS
from aioengine.adapters.peft.targets import HEAD_KINDS, Part, Place
from aioengine.adapters.peft.weights_file import Weights
from aioengine.model.pooling import Head, Kind
from aioengine.model.slots.image import SERIAL_ELEMENTS, ImageShape
from aioengine.model.slots.tokens import TrainedTokens
from aioengine.model.spec import NO_LAYER


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """A LoRA adapter in CPU memory, ready to be copied into a slot; or a rank's share of one."""

    name: str
    path: str
    rank: int
    """The largest effective rank of its modules."""
    digest: str
    """SHA-256 (hex) over the configuration, the weights file and the pooling's: the identity of the content.
    "" for a rank's share, which is not the whole content; see
    :func:`aioengine.adapters.peft.digest.content_digest`."""
    nbytes: int
    """Bytes of its memory."""
    tensors: Mapping[Place, tuple[Tensor, Tensor]]
    """(layer, module) -> (A [r, in], B [out, r]); B holds the scaling, so that delta = B @ A.

    Layer -1 has ``embed_tokens`` (in: vocabulary, out: hidden) and ``lm_head`` (in: hidden, out: vocabulary).
    """
    magnitudes: dict[Place, Tensor] = field(default_factory=dict)
    """DoRA (arXiv:2402.09353): (layer, module) -> the norm that each output's weights get [out], float32."""
    biases: dict[Place, Tensor] = field(default_factory=dict)
    """``lora_bias``: (layer, module) -> bias [out] of B, times the scaling."""
    in_order: Tensor | None = None
    """The memory of ``tensors``, in the order of a slot; see
    :func:`aioengine.model.slots.image.build_image`."""
    shape: ImageShape | None = None
    """The shape of that image, where it is known."""
    computed: Mapping[Place, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A and B as the norms of DoRA need them, for the modules of which ``tensors`` has only a rank's
    share."""
    head: Head | None = None
    """A trained classification head."""
    tokens: TrainedTokens | None = None
    """Rows of the embeddings and of the model's head that it replaces."""
    pooling: Kind | None = None
    """Pooling that sentence-transformers' configuration names, if there is one."""
    invocation: tuple[int, ...] = ()
    """If it is an activated LoRA adapter, it applies from these tokens on; none: to all tokens."""
    version: str = ""
    """Version of the files' content, known without reading it; see :class:`AdapterFolder`."""

    @property
    def scalable(self) -> bool:
        """Whether a step can multiply what it adds by a number: it has no gains and shifts."""
        return not (self.magnitudes or self.biases)


class Packer:
    """Checks and packs the tensors of one file, or the parts of them that a rank has read."""

    def __init__(
        self,
        folder: AdapterFolder,
        file: str,
        contents: Contents,
        weights: Weights,
        *,
        order: SlotOrder,
        dtype: torch.dtype,
        base_weight: Callable[[str], Tensor],
        allow_nonfinite: bool,
    ) -> None:
        self._folder = folder
        self._file = file
        self._contents = contents
        self._plan = contents.plan
        self._layout = contents.layout
        self._weights = weights
        self._order = order
        self._dtype = dtype
        self._base_weight = base_weight
        self._allow_nonfinite = allow_nonfinite

    def pack(self) -> PackedAdapter:
        """Return the adapter, without its files' digest and what other files say. Raises AdapterInvalid."""
        largest = math.inf if self._allow_nonfinite else self._largest()
        for part, tensor in self._of_kind("base"):
            self._check_base(tensor, part.place[1])
        if self._layout.tied:
            self._check_tied()
        tokens, head = self._tokens(), self._head()
        image, matrices = self._plan.fill(self._weights, self._order.allocate)
        targets = self._layout.targets
        magnitudes = {
            part.place: _converted(tensor, 1.0, torch.float32) for part, tensor in self._of_kind("magnitude")
        }
        biases = {
            part.place: _converted(tensor, targets[part.place].scaling, self._dtype)
            for part, tensor in self._of_kind("bias")
        }
        if not self._allow_nonfinite:
            self._check_overflow(largest, matrices, biases)
        nbytes = image.nbytes + sum(magnitude.nbytes for magnitude in magnitudes.values())
        nbytes += 0 if head is None else head.nbytes
        nbytes += 0 if tokens is None else tokens.rows.nbytes
        return PackedAdapter(
            name=self._folder.name,
            path=self._folder.path,
            rank=self._plan.rank,
            digest="",
            nbytes=nbytes,
            tensors=matrices,
            magnitudes=magnitudes,
            biases=biases,
            in_order=image,
            shape=self._plan.shape,
            computed=self._computed(magnitudes, matrices),
            head=head,
            tokens=tokens,
        )

    def _of_kind(self, *kinds: str) -> list[tuple[Part, Tensor]]:
        return [(part, self._weights.tensors[key]) for key, part in self._plan.others if part.kind in kinds]

    def _matrices(self) -> dict[Part, Tensor]:
        """Return A and B as they were read."""
        parts = self._contents.parts.items()
        return {part: self._weights.tensors[key] for key, part in parts if part.kind in ("A", "B")}

    # -- what is checked ---------------------------------------------------------------------

    def _largest(self) -> float:
        """Return the largest absolute value of the file. Raises AdapterInvalid if one is not finite."""
        largest = largest_magnitude(self._weights.runs)
        if not math.isfinite(largest):
            tensors = self._weights.tensors.items()
            key = next(key for key, tensor in tensors if not math.isfinite(largest_magnitude([tensor])))
            self._folder.invalid(f"{self._file}: {key}: the weights contain NaN or infinity")
        return largest

    def _check_base(self, saved: Tensor, module: str) -> None:
        """Check the base weights that PEFT saves with an adapted embedding: they must equal the served
        model's."""
        base = self._base_weight(module)
        same = base.shape == saved.shape and all(
            torch.equal(ours.to("cpu", saved.dtype), theirs)
            for ours, theirs in zip(_pieces(base), _pieces(saved), strict=True)
        )
        if not same:
            self._folder.invalid(
                f"{self._file}: the file carries base-model weights of {module} that differ from the base "
                f"model's: if {module} was trained or resized this adapter cannot be served over this base "
                "model; if not, save the adapter with save_pretrained(..., save_embedding_layers=False)"
            )

    def _check_tied(self) -> None:
        """Check that both copies of lm_head's adapter, which ``ensure_weight_tying`` saves, are equal."""
        found = self._matrices()
        for ours, theirs in (("A", "B"), ("B", "A")):
            head = found[Part((NO_LAYER, "lm_head"), ours)]
            mirrored = found[Part((NO_LAYER, "embed_tokens"), theirs)].t()
            axis = int(head.shape[1] > head.shape[0])
            step = max(1, SERIAL_ELEMENTS // head.shape[1 - axis])
            if not all(map(torch.equal, torch.split(head, step, axis), torch.split(mirrored, step, axis))):
                self._folder.invalid(
                    f"{self._file}: ensure_weight_tying ties the adapter of lm_head to that of embed_tokens, "
                    "but their weights differ"
                )

    def _check_overflow(self, largest: float, matrices: Matrices, biases: Mapping[Place, Tensor]) -> None:
        if largest * max(1.0, self._plan.largest_factor) <= torch.finfo(self._dtype).max:
            return
        for place, target in self._layout.targets.items():
            packed = [*matrices[place], *([biases[place]] if place in biases else [])]
            if not math.isfinite(largest_magnitude(packed)):
                self._folder.invalid(
                    f"{self._file}: {target.name}: the scaled weights overflow {self._dtype}; set lora_dtype "
                    "to bfloat16 or float32"
                )

    # -- what is not A and B -----------------------------------------------------------------

    def _tokens(self) -> TrainedTokens | None:
        found = {(part.place[1], part.kind): tensor for part, tensor in self._of_kind(*TOKEN_KINDS)}
        return self._layout.embeddings.trained(
            self._file, found, self._base_weight, self._dtype, finite=not self._allow_nonfinite
        )

    def _head(self) -> Head | None:
        found = {
            part.kind: _converted(tensor, 1.0, torch.float32) for part, tensor in self._of_kind(*HEAD_KINDS)
        }
        weight, bias = HEAD_KINDS
        return Head(found[weight], found.get(bias)) if weight in found else None

    def _computed(
        self, magnitudes: Mapping[Place, Tensor], matrices: Matrices
    ) -> dict[Place, tuple[Tensor, Tensor]]:
        """Return DoRA's A and B as they were read, in the slots' dtype, where the slot holds only a part of
        them."""
        if not self._contents.cuts or not magnitudes:
            return {}
        found: dict[Part, Tensor] = {}
        for part, source in self._matrices().items():
            if part.place in magnitudes:
                packed = matrices[part.place][part.kind == "B"]
                scaling = self._layout.targets[part.place].scaling if part.kind == "B" else 1.0
                whole = packed.shape == source.shape
                found[part] = packed if whole else _converted(source, scaling, self._dtype)
        return {place: (found[Part(place, "A")], found[Part(place, "B")]) for place in magnitudes}


def largest_magnitude(tensors: Sequence[Tensor]) -> float:
    """Return the largest absolute value; infinity or NaN if there is one."""
    largest = 0.0
    for tensor in tensors:
        for piece in _pieces(tensor):
            # aminmax propagates NaN and costs a fraction of isfinite().all().
            low, high = (x.item() for x in piece.aminmax())
            largest = max(largest, -low, high) if low == low else math.nan
            if not math.isfinite(largest):
                return largest
    return largest


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Split into flat pieces, each too small for torch to start threads."""
    flat = tensor.reshape(-1)
    return torch.split(flat, SERIAL_ELEMENTS) if flat.numel() else ()


def _converted(source: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return ``source * factor``, computed in float32 and rounded once."""
    result = torch.empty(source.shape, dtype=dtype)
    for piece, target in zip(_pieces(source), _pieces(result), strict=True):
        target.copy_(piece if factor == 1.0 else piece.float() * factor)
    return result
