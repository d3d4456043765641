"""Compiles the kernels for a GPU, which this machine need not have, and reads the resources that each needs.

For tests; serving does not need it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from support.triton_targets import DATA_CENTERS, GPUS, Gpu, Usage, usage_of
from triton.compiler import ASTSource

from aioengine.kernels.triton.attention import PART, default_config
from aioengine.kernels.triton.blocks import FEW_ROWS as FEW_TOKENS
from aioengine.kernels.triton.blocks import FORMATS, BlockConfig, default_blocks
from aioengine.kernels.triton.experts import BLOCK_K, BLOCK_N, ROWS, TILES
from aioengine.kernels.triton.jit.attention import attention_kernel
from aioengine.kernels.triton.jit.blocks import block_linear_kernel, expert_blocks_kernel
from aioengine.kernels.triton.jit.elementwise import affine_kernel, embed_kernel
from aioengine.kernels.triton.jit.expand import expand_kernel
from aioengine.kernels.triton.jit.experts import expert_kernel, tiles_kernel
from aioengine.kernels.triton.jit.layer import (
    KINDS,
    activate_kernel,
    add_rms_norm_kernel,
    rope_store_kernel,
)
from aioengine.kernels.triton.jit.shrink import shrink_kernel
from aioengine.kernels.triton.launch import power_of_two
from aioengine.kernels.triton.layer import SILU_COLUMNS, norm_warps, rope_heads
from aioengine.kernels.triton.query_tiles import FEW_ROWS, rows_of_prompts
from aioengine.kernels.triton.table import (
    AFFINE_COLUMNS,
    EMBED_RANKS,
    SHORT,
    ExpandConfig,
    Key,
    ShrinkConfig,
    default_expand,
    default_shrink,
)

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 320, 512)
WIDTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
EXPERTS = 512
"""The most experts of a layer."""
HIDDEN = 16384
"""The largest hidden size."""
HEAD_DIMS = (64, 80, 96, 128, 256)
OPTIONS = {"WINDOWED": (64, 128, 256), "CAPPED": (256,), "SINKS": (64,)}
"""Head sizes of models with windows, that cap their scores, and that have sinks."""
GROUPS = (1, 3, 4, 7, 8)
"""Query heads of a key head."""
_DTYPES = {"bf16": 16, "fp16": 16, "fp32": 32}


class Variant(NamedTuple):
    """One specialisation of a kernel."""

    kernel: str
    dtype: str
    """dtype of activations and pools: "bf16", "fp16" or "fp32"."""
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    int8: bool = False
    """Whether the adapters are int8."""
    fp8: bool = False
    """Whether the cache is float8."""

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.constants)
        narrow = " int8" * self.int8 + " fp8" * self.fp8
        return f"{self.kernel} {self.dtype}{narrow} {blocks} warps={self.num_warps} stages={self.num_stages}"


def variants() -> list[Variant]:
    """Return all variants that the default table chooses for any rank, width, dtype and phase."""
    found: dict[Variant, None] = {}
    for dtype, bits in _DTYPES.items():
        for rank in RANKS:
            for width in WIDTHS:
                for longest in (SHORT, SHORT + 1):
                    shrink = default_shrink(Key.of("shrink", bits, rank, width, longest))
                    found.update(dict.fromkeys(of_shrink(dtype, shrink)))
                    if (dtype, rank) == ("bf16", 16):
                        found.update(dict.fromkeys(of_shrink(dtype, shrink, int8=True)))
                    expand = default_expand(Key.of("expand", bits, rank, width, longest))
                    found[of_expand(dtype, expand)] = None
                    if (dtype, rank) == ("bf16", 16):
                        found[of_expand(dtype, expand, int8=True)] = None
        found.update(dict.fromkeys(of_norm(dtype, width) for width in WIDTHS if width <= HIDDEN))
        for head_dim in HEAD_DIMS:
            found.update(dict.fromkeys(of_rope(dtype, head_dim)))
            for group in GROUPS:
                found.update(dict.fromkeys(of_attention(dtype, bits, head_dim, group)))
        found.update(dict.fromkeys(of_elementwise(dtype)))
        found.update(dict.fromkeys(of_blocks(dtype, bits)))
    return list(found)


def of_shrink(dtype: str, config: ShrinkConfig, *, int8: bool = False) -> Iterator[Variant]:
    """List the specialisations of the shrink kernel: with whole inputs, and with split ones."""
    blocks = {"BLOCK_M": config.block_m, "BLOCK_R": config.block_r, "BLOCK_K": config.block_k}
    for split in sorted({0, int(config.split_k > 1)}):
        constants = (*blocks.items(), ("PARTS", config.split_k), ("SPLIT", split), ("INT8", int(int8)))
        yield Variant("shrink", dtype, constants, config.num_warps, config.num_stages, int8)


def of_expand(dtype: str, config: ExpandConfig, *, int8: bool = False) -> Variant:
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_R": config.block_r}
    return Variant("expand", dtype, tuple(blocks.items()), config.num_warps, config.num_stages, int8)


def of_attention(
    dtype: str, bits: int, head_dim: int, group: int, gpus: Sequence[Gpu] = DATA_CENTERS
) -> Iterator[Variant]:
    """Decoding with the keys whole and split, and prompts, as these GPUs do it, which have the limits of the
    first."""
    of_prompts = [(rows_of_prompts(bits, head_dim, gpu.capability), 1) for gpu in gpus]
    for rows, splits in dict.fromkeys([(FEW_ROWS, 1), (FEW_ROWS, 8), *of_prompts]):
        block_n, _, num_warps, num_stages = default_config(head_dim, bits, splits, rows, gpus[0].limits)
        constants = {"GROUP": group, "D": head_dim, "BLOCK_SIZE": 16, "SPLITS": splits, "BLOCK_M": rows}
        constants |= {
            "BLOCK_N": block_n,
            "BLOCK_D": power_of_two(head_dim),
            "PART": PART,
            "STAGES": num_stages,
            **dict.fromkeys(OPTIONS, 0),
        }
        for fp8 in (False, True):
            yield Variant("attention", dtype, tuple(constants.items()), num_warps, num_stages, fp8=fp8)
        for option, head_dims in OPTIONS.items():
            if head_dim in head_dims:
                chosen = tuple({**constants, option: 1}.items())
                yield Variant("attention", dtype, chosen, num_warps, num_stages)


def of_norm(dtype: str, size: int) -> Variant:
    """List the specialisations of the norm kernel, among them those with a sum before it."""
    return Variant("add_rms_norm", dtype, (("ADD", 1), ("ROUNDED", 1), ("BLOCK", size)), norm_warps(size), 3)


def of_rope(dtype: str, head_dim: int) -> Iterator[Variant]:
    """List the specialisations of the RoPE kernel: without norms of the heads, and with them."""
    for norm in (0, 1):
        blocks = {"NORM": norm, "ROUNDED": 1, "NEIGHBOURS": 0, "PARTIAL": 0, "BLOCK_SIZE": 16}
        blocks |= {"BLOCK_H": rope_heads(head_dim), "BLOCK_D": power_of_two(head_dim // 2)}
        for fp8 in (False, True):
            yield Variant("rope_store", dtype, tuple(blocks.items()), 4, 3, fp8=fp8)


def of_elementwise(dtype: str) -> tuple[Variant, ...]:
    """Activation, affine, embedding, and the experts' linears."""
    of_experts = ("BLOCK_N", BLOCK_N), ("BLOCK_K", BLOCK_K[_DTYPES[dtype]])
    return (
        *(
            Variant("activate", dtype, (("KIND", kind), ("BLOCK", SILU_COLUMNS)), 4, 3)
            for kind in range(len(KINDS))
        ),
        Variant("affine", dtype, (("BLOCK_M", SHORT), ("BLOCK_N", AFFINE_COLUMNS)), 4, 3),
        *(
            Variant("expert", dtype, (("BIAS", bias), ("BLOCK_M", rows), *of_experts), 4, 3)
            for rows in ROWS
            for bias in (0, 1)
        ),
        *(
            Variant("tiles", dtype, (("ROWS", rows), ("EXPERTS", EXPERTS), ("BLOCK", TILES)), 4, 3)
            for rows in ROWS
        ),
        Variant("embed", dtype, (("BLOCK_M", SHORT), ("BLOCK_R", EMBED_RANKS), ("INT8", 0)), 4, 3),
    )


def of_blocks(dtype: str, bits: int) -> Iterator[Variant]:
    """List products with quantized weights: few tokens and many, small and large groups, narrow and wide
    weights, with inputs that are ordered or not."""
    for rows in (FEW_TOKENS, FEW_TOKENS + 1):
        for n, group in ((4096, 128), (28672, 128), (4096, 32)):
            config = default_blocks(rows, n, group, bits)
            for format in FORMATS:
                if format != "mxfp4" or group == 32:
                    yield of_block(format, dtype, config)
            yield of_block("int4", dtype, config, zeros=True)
        for format, group in (("mxfp4", 32), ("int4", 128)):  # of experts
            config = default_blocks(rows, 4096, group, bits)
            constants = {"FORMAT": FORMATS[format], "ZEROS": 0, "BIAS": 1, **config.blocks()}
            yield Variant(
                "expert_blocks", dtype, tuple(constants.items()), config.num_warps, config.num_stages
            )
        config = default_blocks(rows, 4096, 128, bits, ordered=True)
        yield of_block("int4", dtype, config, zeros=True, ordered=True)


def of_block(
    format: str, dtype: str, config: BlockConfig, *, zeros: bool = False, ordered: bool = False
) -> Variant:
    constants = {"FORMAT": FORMATS[format], "ZEROS": int(zeros), "ORDERED": int(ordered), "BIAS": 0}
    constants |= config.blocks()
    return Variant("block_linear", dtype, tuple(constants.items()), config.num_warps, config.num_stages)


def compiles(variant: Variant, capability: int) -> bool:
    """Whether GPUs of this compute capability run the variant."""
    if variant.kernel == "attention":
        rows = dict(variant.constants)["BLOCK_M"]
        head_dim, bits = dict(variant.constants)["D"], _DTYPES[variant.dtype]
        return rows in (FEW_ROWS, rows_of_prompts(bits, head_dim, capability))
    return True


def compile_variant(variant: Variant, gpu: int | str) -> Usage:
    """Compile (a second or so, for AMD some) for a GPU of :data:`GPUS`, or the compute capability of one of
    NVIDIA's; tensors 16-byte aligned, sizes multiples of 16, as model dimensions are.

    Raises what triton raises if it does not compile, and RuntimeError if ptxas fails.
    """
    kernel = _KERNELS[variant.kernel]
    constants = dict(variant.constants)
    signature = {name: _type(name, variant.dtype, constants) for name in kernel.arg_names}
    if variant.int8:
        signature["memory_ptr"] = "*i8"
    if constants.get("FORMAT") == FORMATS["mxfp4"] and "scale_ptr" in signature:  # experts have addresses
        signature["scale_ptr"] = "*u8"
    if variant.fp8 and "keys_ptr" in signature:
        signature |= dict.fromkeys(("keys_ptr", "values_ptr"), "*u8")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in _ANY_NUMBER
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    target = GPUS[gpu if isinstance(gpu, str) else f"sm_{gpu}"].target
    return usage_of(source, target, variant.num_warps, variant.num_stages)


_KERNELS: Mapping[str, Any] = {
    "shrink": shrink_kernel,
    "expand": expand_kernel,
    "affine": affine_kernel,
    "embed": embed_kernel,
    "expert": expert_kernel,
    "tiles": tiles_kernel,
    "attention": attention_kernel,
    "add_rms_norm": add_rms_norm_kernel,
    "activate": activate_kernel,
    "rope_store": rope_store_kernel,
    "block_linear": block_linear_kernel,
    "expert_blocks": expert_blocks_kernel,
}
_POINTERS = {
    **dict.fromkeys(("data_ptr", "codes_ptr"), "*u8"),
    "zero_ptr": "*i16",
    "group_of_ptr": "*i32",
    "scale_ptr": "*fp32",
    **dict.fromkeys(("tiles_ptr", "tables_ptr", "arrivals_ptr"), "*i32"),
    **dict.fromkeys(("ids_ptr", "cells_ptr", "table_ptr", "parts_ptr", "ends_ptr"), "*i64"),
    **dict.fromkeys(
        ("scales_ptr", "row_scales_ptr", "partials_ptr", "stats_ptr", "cos_ptr", "sin_ptr"), "*fp32"
    ),
}
_FLOATS = ("eps", "scale", "soft_cap", "offset", "factor", "alpha", "limit")
_ANY_NUMBER = (
    *(*_FLOATS, "heads", "kv_heads", "window", "table_stride", "most_parts", "place"),
    *("tokens", "middle", "group", "groups", "tiles", "experts", "parts", "outputs"),
)


def _type(argument: str, dtype: str, constants: Mapping[str, int]) -> str:
    if argument in constants:
        return "constexpr"
    if argument.endswith("_ptr"):
        return _POINTERS.get(argument, f"*{dtype}")
    return "fp32" if argument in _FLOATS else "i32"
