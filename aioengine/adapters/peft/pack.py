"""Checks the values of a file's tensors, and packs them for an image of a slot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aioengine.adapters.peft.folder import invalid_weights
from aioengine.adapters.peft.targets import Layout
from aioengine.adapters.peft.values import HEAD_KINDS, TOKEN_KINDS, Matrices, Part, Place, converted, scaled
from aioengine.model.parallel.group import take
from aioengine.model.pooling import Head, Kind
from aioengine.model.slots.image import is_finite
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.slots.tokens import TrainedTokens
from aioengine.model.spec import NO_LAYER, ModelSpec


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedAdapter:
    """A LoRA adapter in CPU memory, ready to be put into an image of a slot; or a rank's share of one."""

    rank: int
    """The largest effective rank of its modules."""
    find_digest: Callable[[], str] = str
    """Function that waits for :attr:`digest`, which is computed beside the rest."""
    tensors: Matrices
    """(layer, module) -> (A [r, in], B [out, r]), so that delta = scaling * B @ A; in the file's dtype,
    unless they had to be rounded already.

    Layer -1 has ``embed_tokens`` (in: vocabulary, out: hidden) and ``lm_head`` (in: hidden, out: vocabulary).
    """
    scalings: Mapping[Place, float] = field(default_factory=dict)
    """What B is still to be multiplied by; 1 where it says nothing."""
    magnitudes: dict[Place, Tensor] = field(default_factory=dict)
    """DoRA (arXiv:2402.09353): (layer, module) -> the norm that each output's weights get [out], float32."""
    biases: dict[Place, Tensor] = field(default_factory=dict)
    """``lora_bias``: (layer, module) -> bias [out] of B, times the scaling."""
    computed: Matrices = field(default_factory=dict)
    """A and B as the norms of DoRA need them, of which ``tensors`` may have only a rank's share."""
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
    def digest(self) -> str:
        """SHA-256 (hex) over the configuration, the weights file and the pooling's: the identity of the
        content. Of several ranks only the first computes it; "" for the others."""
        return self.find_digest()

    @property
    def scalable(self) -> bool:
        """Whether a step can multiply what it adds by a number: it has no gains and shifts."""
        return not (self.magnitudes or self.biases)

    def scaled(self, dtype: torch.dtype) -> PackedAdapter:
        """Return it with A and B in ``dtype``, and the scalings in B."""
        return replace(self, tensors=scaled(self.tensors, self.scalings, dtype), scalings={})

    def check_finite(self, dtype: torch.dtype, spec: ModelSpec) -> None:
        """Raise AdapterInvalid if A or B has NaN or infinity, or becomes too large in ``dtype``."""
        rounded = self.scaled(dtype).tensors
        for (layer, module), pair in self.tensors.items():
            name = spec.module_name(layer, module)
            for side, given, becomes in zip("AB", pair, rounded[layer, module], strict=True):
                if not is_finite(given):
                    invalid_weights(f"{name}.lora_{side}: the weights contain NaN or infinity")
                if not is_finite(becomes):
                    invalid_weights(
                        f"{name}: the scaled weights overflow {dtype}; set lora_dtype to bfloat16 or float32"
                    )


def pack(
    layout: Layout,
    tensors: Mapping[str, Tensor],
    slot: SlotLayout,
    *,
    dtype: torch.dtype,
    base_weight: Callable[[str], Tensor],
) -> PackedAdapter:
    """Pack what a ``slot`` holds of the ``tensors`` of a file by key, without the digest and what other files
    say. Raises AdapterInvalid."""
    read = {part: tensors[key] for key, part in layout.parts.items()}
    alone = slot.shard.size == 1

    def of_kind(*kinds: str) -> dict[Part, Tensor]:
        return {part: tensor for part, tensor in read.items() if part.kind in kinds}

    def outputs(part: Part, tensor: Tensor) -> Tensor:
        """Return the outputs that this rank computes."""
        return tensor if alone else take(tensor, slot.share(part.place[1]).outputs)

    for part, saved in of_kind("base").items():
        ours = saved if alone else saved[slot.partition.vocabulary]
        _check_base(ours, part.place[1], base_weight(part.place[1]))
    if layout.tied:
        _check_tied(read)
    for key, part in layout.parts.items():
        if part.kind in (*HEAD_KINDS, "magnitude", "bias") and not is_finite(tensors[key]):
            invalid_weights(f"{key}: the weights contain NaN or infinity")
    rows = {(part.place[1], part.kind): tensor for part, tensor in of_kind(*TOKEN_KINDS).items()}
    scalings = {place: target.scaling for place, target in layout.targets.items()}
    pairs: Matrices = {place: (read[Part(place, "A")], read[Part(place, "B")]) for place in scalings}
    biases = {
        part.place: converted(outputs(part, tensor), dtype, scalings[part.place])
        for part, tensor in of_kind("bias").items()
    }
    if layout.dora:  # the norms are of what the slot has
        pairs, scalings = scaled(pairs, scalings, dtype), {}
    head = {part.kind: converted(tensor, torch.float32) for part, tensor in of_kind(*HEAD_KINDS).items()}
    weight, bias = HEAD_KINDS
    return PackedAdapter(
        rank=max(target.rank for target in layout.targets.values()),
        tensors=pairs if alone else {place: _held(slot, place[1], *pair) for place, pair in pairs.items()},
        scalings=scalings,
        magnitudes={
            part.place: converted(outputs(part, tensor), torch.float32)
            for part, tensor in of_kind("magnitude").items()
        },
        biases=biases,
        computed=_computed(slot, pairs) if layout.dora else {},
        head=Head(head[weight], head.get(bias)) if weight in head else None,
        tokens=None if layout.embeddings is None else layout.embeddings.trained(rows, base_weight, dtype),
        invocation=tuple(layout.config.alora_invocation_tokens or ()),
    )


def _held(slot: SlotLayout, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parts of A and B that a slot holds of several ranks' slots."""
    share = slot.share(module)
    return a[share.a], take(b, share.b)


def _computed(slot: SlotLayout, pairs: Matrices) -> Matrices:
    """Return A and B for the norms of the weight that the rank has: its outputs, or its inputs of all
    outputs."""
    if slot.shard.size == 1:
        return pairs
    of = slot.partition
    return {
        place: (a[:, of.inputs(place[1])], take(b, of.outputs(place[1]))) for place, (a, b) in pairs.items()
    }


def _check_base(saved: Tensor, module: str, base: Tensor) -> None:
    """Check that the base weights that PEFT saves with an adapted embedding are those of the served
    model."""
    if not torch.equal(base.to("cpu", saved.dtype), saved):
        invalid_weights(
            f"the file carries base-model weights of {module} that differ from the base model's: if {module} "
            "was trained or resized this adapter cannot be served over this base model; if not, save the "
            "adapter with save_pretrained(..., save_embedding_layers=False)"
        )


def _check_tied(tensors: Mapping[Part, Tensor]) -> None:
    """Check that both copies of lm_head's adapter, which ``ensure_weight_tying`` saves, are equal."""
    for ours, theirs in (("A", "B"), ("B", "A")):
        head = tensors[Part((NO_LAYER, "lm_head"), ours)]
        mirrored = tensors[Part((NO_LAYER, "embed_tokens"), theirs)].t()
        if not torch.equal(head, mirrored):
            invalid_weights(
                "ensure_weight_tying ties the adapter of lm_head to that of embed_tokens, but their weights "
                "differ"
            )
