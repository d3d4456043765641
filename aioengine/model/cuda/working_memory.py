"""What steps take on a CUDA device beside weights, slots and KV blocks: upper bounds, computed from the
shapes of the largest step. No torch here.

What the driver, cuBLAS, NCCL, recorded steps and reads of adapters take has to fit into what the plan leaves
free (``memory_plan.AUTO_KV_ON_CUDA``).
"""

from __future__ import annotations

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.slots.layout import MAX_RANK
from aioengine.model.spec import ModelSpec

PIECE_BYTES = 2**21 * 52
"""Bytes that are sampled, or scored, at a time; see ``sampler._WIDE_CELLS`` and ``runner.PIECE_BYTES``."""

SAMPLED_BYTES = 32
"""Bytes for each number of the logits, beside them, while a step is sampled: copies in float32."""

_SPLIT_PROGRAMS, _PART, _SPLIT_ROWS = 256, 512, 16
"""Values of :mod:`aioengine.kernels.triton.attention`: with fewer programs than the first number, keys are
split into parts of the second number of keys. A tile has the third number of rows, or the query heads of a
key head."""

_SCRATCH_BYTES = 16 * 2**20
"""Everything else that a layer computes in: tiles, parts of a shrink."""

EXPANDED_BYTES = 2**22 * 20
"""Bytes of a quantized checkpoint's weight that torch expands at a time; see ``weight.PIECE_ELEMENTS``.
Counted also where the kernels read all of its weights as they are stored."""


def working_memory(
    spec: ModelSpec, local: ModelSpec, config: EngineConfig, *, dtype_bytes: int, max_model_len: int
) -> dict[str, int]:
    """Return the bytes of "activations" (the layers at the largest step) and of "sampling" (logits of all
    sequences, and what is computed of them). ``local`` is a rank's share of ``spec``."""
    scratch = _SCRATCH_BYTES + _split_bytes(local, max_model_len) + EXPANDED_BYTES * bool(local.packed)
    tokens = min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len)
    each = token_bytes(local, dtype_bytes, 0 if config.lora is None else _largest_rank(config.lora))
    logits = config.max_num_seqs * spec.vocab_size
    return {
        "activations": tokens * each + scratch,
        "sampling": logits * (SAMPLED_BYTES + dtype_bytes) + PIECE_BYTES,
    }


def _largest_rank(lora: LoRAConfig) -> int:
    """Return the largest rank that a step may have: that of a mix."""
    return MAX_RANK if lora.slot_memory is not None else min(MAX_RANK, lora.max_loras * lora.max_lora_rank)


def token_bytes(local: ModelSpec, dtype_bytes: int, max_rank: int) -> int:
    """Return the most bytes that are in use at a time for each token of a step, in the layers of the native
    decoder.

    In use throughout are the hidden state, what is yet to be added to it, and the last layer's queries, keys,
    values and attention. In addition there are either those of the present layer, or the values of its MLP.
    """
    hidden, q = local.hidden_size, local.q_size
    qkv = q + 2 * local.kv_size
    mlp = 3 * local.intermediate_size
    wide = 0
    if isinstance(local, MixtureSpec):
        # Rows of the experts: inputs, gate and up, outputs twice; and once each in float32.
        expert = max(hidden + 2 * local.expert_size, 3 * local.expert_size, 3 * hidden)
        mlp = 3 * local.shared_size
        mlp += local.experts_per_token * (expert + hidden)
        wide = 4 * (2 * hidden + 4 * local.experts) + 32 * local.experts_per_token
    width = -(-max_rank // 16) * 16 * 3
    numbers = 3 * hidden + qkv + q + max(qkv + q, mlp, hidden + local.intermediate_size) + 2 * width
    rotations = 2 * max(2, len(local.ropes)) * local.head_dim * 4  # one or two; the lab's shapes don't say
    return numbers * dtype_bytes + wide + rotations + 128


def _split_bytes(local: ModelSpec, max_model_len: int) -> int:
    """Return what decodes with split keys take for sums of parts, in float32."""
    group = -(-local.num_heads // local.num_kv_heads)
    rows = max(_SPLIT_ROWS, 1 << (group - 1).bit_length())
    columns = max(16, 1 << (local.head_dim - 1).bit_length()) + 2
    return _SPLIT_PROGRAMS * -(-max_model_len // _PART) * rows * columns * 4
