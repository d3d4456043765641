"""What steps take on a CUDA device beside weights, slots and KV blocks. No torch here.

Activations and sampling are upper bounds, computed from the shapes of the largest step. What the driver, NCCL
and cuBLAS take are estimates, which the engine compares with what was taken once it has started.
"""

from __future__ import annotations

from aioengine.checks import format_bytes
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.slots.layout import MAX_RANK
from aioengine.model.spec import ModelSpec

WORKSPACE_BYTES = 32 * 2**20
"""cuBLAS's workspace for each stream, on Hopper; PyTorch takes a quarter of that before it
(docs.pytorch.org, ``CUBLAS_WORKSPACE_CONFIG``)."""

EXCHANGE_BYTES = 32 * 2 * (4 * 2**20 + 4800 * 2**10 + 512 * 2**10)
"""NCCL's buffers: those of its three protocols (NCCL_BUFFSIZE 4 MiB, LL128, LL) for a ring and a tree on 32
channels. Estimate by NCCL's defaults; machines with fewer links use fewer channels."""

GRAPH_NODE_BYTES = 16 * 2**10
"""The driver's memory for a launch in a recorded graph. Estimate; not measured yet."""

LAYER_LAUNCHES = 25
"""Launches of a layer in a recorded step, rounded up: 14 of the kernels, 4 products with up to 2 each."""

EXCHANGE_LAUNCHES = 22
"""The same beside them where there are several ranks, rounded up: 2 sums and, if all of an adapter is split,
4 sums or gathers with the copies before and after them."""

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

_PIECE_ELEMENTS = 2**22
"""``weight.PIECE_ELEMENTS``, without torch."""

EXPANDED_BYTES = _PIECE_ELEMENTS * 20
"""Bytes of a quantized checkpoint's weight that torch expands at a time; see ``weight.PIECE_ELEMENTS``.
Counted also where the kernels read all of its weights as they are stored."""


DETAILS = {
    "activations": "the layers at the largest step",
    "sampling": "logits of all sequences, and what is computed of them",
    "graphs": "recorded steps and the driver's part of them (estimate)",
    "workspaces": f"{format_bytes(WORKSPACE_BYTES)} of cuBLAS for each stream that multiplies",
    "exchange": "NCCL's buffers (estimate)",
    "reads": "DoRA's norms, of one adapter at a time",
}
"""The parts, and what each is."""


def sizes(most: int) -> list[int]:
    """List the batch sizes that recorded steps of up to ``most`` sequences are padded to: 1, 2, 4, then every
    8, and beyond 64 eight for each doubling."""
    found = [size for size in (1, 2, 4) if size < most]
    size = 8
    while size < most:
        found.append(size)
        size += max(8, (1 << size.bit_length()) // 16)
    return [*found, most]


def mixed_sizes(most: int) -> tuple[int, ...]:
    """List the numbers of tokens that recorded steps with parts of prompts are padded to, where a step has up
    to ``most`` tokens. Beyond the last, a GPU computes for longer than the host needs to launch."""
    return tuple(min(size, most) for size in (128, 256, 384, 512) if size - 128 < most)


def working_memory(
    spec: ModelSpec, local: ModelSpec, config: EngineConfig, *, dtype_bytes: int, max_model_len: int
) -> dict[str, int]:
    """Return the bytes of each part on each device, for an engine with this configuration. ``local`` is a
    rank's share of ``spec``."""
    lora, size, rows = config.lora, config.tensor_parallel_size, config.max_num_seqs
    logits = rows * spec.vocab_size
    scratch = _SCRATCH_BYTES + _split_bytes(local, max_model_len) + EXPANDED_BYTES * bool(local.packed)
    each = token_bytes(local, dtype_bytes, 0 if lora is None else lora.max_lora_rank)
    most = token_bytes(local, dtype_bytes, 0 if lora is None else _largest_rank(lora))
    tokens = min(config.max_num_batched_tokens, rows * max_model_len)
    plain = spec.impl == "native" and not isinstance(spec, MixtureSpec)
    recorded = config.cuda_graphs and plain
    graphs = 0
    if recorded:
        kinds = 1 if lora is None else 3
        launches = (LAYER_LAUNCHES + EXCHANGE_LAUNCHES * (size > 1)) * spec.num_layers
        mixed = mixed_sizes(config.max_num_batched_tokens)
        width = -(-max_model_len // config.block_size) + 32
        inputs = 4 * (width * (sum(sizes(rows)) + len(mixed) * rows) + 32 * sum(mixed))
        driver = (len(sizes(rows)) + len(mixed)) * kinds * launches * GRAPH_NODE_BYTES
        graphs = max(rows, *mixed) * each + scratch + 2 * logits * dtype_bytes + inputs + driver
    return {
        "activations": tokens * most + scratch,
        "sampling": logits * (SAMPLED_BYTES + dtype_bytes) + PIECE_BYTES,
        "graphs": graphs,
        "workspaces": (1 + recorded + (lora is not None)) * WORKSPACE_BYTES,
        "exchange": EXCHANGE_BYTES if size > 1 else 0,
        "reads": 0 if lora is None else _read_bytes(local, lora),
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


def _read_bytes(local: ModelSpec, lora: LoRAConfig) -> int:
    """Return the most that :func:`aioengine.adapters.peft.dora.rows_of` takes: a piece of a weight, expanded,
    in float32 and squared; A and B as they are and in float32; and the sums and biases of all rows."""
    shapes = {module: local.linear(module) for module in local.targets(lora.target_modules)}
    piece = _PIECE_ELEMENTS * 2 * 4 + EXPANDED_BYTES * bool(local.packed)
    matrices = max(sum(shape) for shape in shapes.values()) * lora.max_lora_rank * 2 * 4
    rows = sum(shape.out_features * local.layers_with(module) for module, shape in shapes.items())
    widest = max(shape.out_features for shape in shapes.values())
    return piece + matrices + (4 * rows + 3 * lora.max_lora_rank * widest) * 4


def _split_bytes(local: ModelSpec, max_model_len: int) -> int:
    """Return what decodes with split keys take for sums of parts, in float32."""
    group = -(-local.num_heads // local.num_kv_heads)
    rows = max(_SPLIT_ROWS, 1 << (group - 1).bit_length())
    columns = max(16, 1 << (local.head_dim - 1).bit_length()) + 2
    return _SPLIT_PROGRAMS * -(-max_model_len // _PART) * rows * columns * 4
