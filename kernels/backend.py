"""The operations of a model step, which every backend has with one signature."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from aioengine.kernels.plan.attention import AttentionPlan
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.plan.lora import LoRABatch
from aioengine.kernels.slots import LoRAPool
from aioengine.kernels.weight import Weight


class Norm(NamedTuple):
    """A root-mean-square norm: Zhang & Sennrich, 2019, arXiv:1910.07467."""

    weight: Tensor
    """[size]"""
    eps: float
    offset: float | None = None
    """Added to the weight. None: the norm is rounded before it is multiplied by the weight, too. With an
    offset, which may be 0, it is not, as when the models were trained."""


class HeadNorms(NamedTuple):
    """Norms of queries and keys before the rotation, which some models have. A norm covers as many heads
    together as its weight is long: one head, or all of them."""

    q: Tensor
    """[d] or [H * d] weight"""
    k: Tensor
    """[d] or [K * d] weight"""
    eps: float
    offset: float | None = None
    """Offset of the norms' weights, as in :class:`Norm`."""


class Rotation(NamedTuple):
    """Rotation of queries and keys by their positions (RoFormer: Su et al., 2021, arXiv:2104.09864). The
    dimensions from 2 * half on are not rotated."""

    cos: Tensor
    """[T, 1, half] float32, contiguous"""
    sin: Tensor
    """The same."""
    neighbours: bool = False
    """Whether dimension 2 i is paired with 2 i + 1. Otherwise i is paired with i + half."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, each [blocks, block_size, K, d].

    Each backend has its own layout within a block, so it can read only blocks that it has stored itself. Both
    tensors are contiguous.
    """

    keys: Tensor
    values: Tensor


class Scores(NamedTuple):
    """Changes of the scores of queries and keys before their softmax."""

    window: int | None = None
    """A token attends only to the last ``window`` positions up to its own. None: to all."""
    scale: float | None = None
    """Factor of all scores; None: ``d ** -0.5``."""
    soft_cap: float | None = None
    """After the scale: ``soft_cap * tanh(score / soft_cap)``."""
    sinks: Tensor | None = None
    """[H], contiguous: scores of one more key for each head, whose value is zero. They are neither scaled nor
    capped (Xiao et al., 2023, arXiv:2309.17453)."""


class Backend(Protocol):
    """Interface of a backend: the operations that compute a layer.

    Shapes: T tokens of N sequences, H query heads and K key heads of size d (H a multiple of K), blocks of
    ``block_size`` tokens, S adapter slots, n slices of a fused linear (3 for q, k and v). Tensors are of the
    model's dtype and on the backend's device unless it says otherwise; sums are float32.

    Metadata (:class:`AttentionPlan`, :class:`LoRABatch`) is built once for all layers of a step.
    """

    @property
    def name(self) -> str: ...

    @property
    def capturable(self) -> bool:
        """Whether equal shapes give equal launches for any values in the metadata's tensors. Then a step can
        be recorded as a CUDA graph, and tokens whose cell is below 0 are padding, of which nothing is stored.
        """

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        """``x W^T + bias``: ``x`` [T, in], ``weight`` [out, in], ``bias`` [out]; returns [T, out]."""

    def expert_linear(self, x: Tensor, weight: Weight, bias: Tensor | None, plan: ExpertPlan) -> Tensor:
        """``y[s] = W[expert(s)] x[s] + bias[expert(s)]`` for the rows of ``plan``.

        ``x`` [S, in], ``weight`` [experts * out, in], one expert's below the other's, ``bias``
        [experts * out]; returns [S, out].
        """

    def add_rms_norm(self, hidden: Tensor, delta: Tensor | None, norm: Norm, factor: float = 1.0) -> Tensor:
        """Compute ``hidden += factor * delta`` in place, if there is a delta, and then its norm.

        ``hidden``, ``delta`` [T, size], contiguous; returns [T, size]. Rounded to the dtype after the sum and
        after the norm.
        """

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` for ``gate_up`` [T, 2 * size], contiguous; returns [T, size], rounded after
        silu, too. SwiGLU: Shazeer, 2020, arXiv:2002.05202.
        """

    def gelu_and_mul(self, gate_up: Tensor) -> Tensor:
        """Return the same with GELU in its approximation by tanh: Hendrycks & Gimpel, 2016,
        arXiv:1606.08415."""

    def clamped_swiglu(self, gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
        """``g * sigmoid(alpha * g) * (u + 1)``, with ``g`` the gate up to ``limit``, and ``u`` up to between
        ``-limit`` and ``limit``.

        ``gate_up`` [T, 2 * size], contiguous; returns [T, size], rounded once. GPT-OSS: OpenAI, 2025,
        arXiv:2508.10925.
        """

    def soft_cap_(self, x: Tensor, cap: float) -> None:
        """``cap * tanh(x / cap)`` in place; ``x`` [N, size], contiguous."""

    def argmax(self, logits: Tensor) -> Tensor:
        """Return the first index of each row's largest value, a NaN being the largest; -1 if that is not
        finite.

        ``logits`` [N, size]; returns [N] of int64.
        """

    def rope_store(
        self,
        qkv: Tensor,
        norms: HeadNorms | None,
        rotation: Rotation,
        cache: LayerCache,
        plan: AttentionPlan,
    ) -> None:
        """Norm and rotate queries and keys, and store keys and values into the cells of the plan.

        ``qkv`` [T, H + 2 K, d], contiguous. Queries are changed in place; keys may be, too.
        """

    def paged_attention(self, qkv: Tensor, cache: LayerCache, plan: AttentionPlan, scores: Scores) -> Tensor:
        """Each token attends to its sequence up to itself.

        ``qkv`` as :meth:`rope_store` left it, which must come first. Returns [T, H * d]. Query head h reads
        key head ``h // (H / K)``. Cells of other sequences, and beyond a sequence's end, may hold anything.
        """

    def lora_shrink(self, x: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
        """``h[t, j] = A[slot(t), j] x[t]``, times the weight of t's segment.

        ``x`` [T, in]; returns h [T, n, ``batch.width``] in x's dtype, zero wherever no adapter reaches
        (tokens without one, and columns from A's rows on).

        Like all LoRA operations, it touches only the tokens of ``batch.segments``, and in the memory only the
        parts that the table gives to their slots.
        """

    def lora_expand(self, h: Tensor, pool: LoRAPool, y: Tensor, batch: LoRABatch) -> None:
        """``y[t, b_offsets[j] : b_offsets[j] + widths[j]] += B[j][slot(t)] h[t, j]``, in place.

        ``h`` [T, n, ``batch.width``], ``y`` [T, >= max(b_offsets[j] + widths[j])].
        """

    def lora_affine(self, y: Tensor, pool: LoRAPool, batch: LoRABatch) -> None:
        """``y[t, offsets[j] : offsets[j] + affine_widths[j]] += gain * y[t, ...] + shift``, in place.

        Touches only the tokens of ``batch.affine``, and only slices with gain and shift. DoRA and trained
        biases use it.
        """

    def lora_embed(self, token_ids: Tensor, pool: LoRAPool, batch: LoRABatch) -> Tensor:
        """``h[t, 0] = A[slot(t)][:, token_ids[t]]``, times the weight: :meth:`lora_shrink` of one-hot tokens.

        ``token_ids`` [T]; returns h [T, 1, ``batch.width``] in the pool's dtype, zero wherever no adapter
        reaches.
        """
