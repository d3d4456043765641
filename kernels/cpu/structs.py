"""The C structures of ``src/decoder.cpp`` and ``src/ops.h``, field by field."""

from __future__ import annotations

from ctypes import CFUNCTYPE, POINTER, Structure, c_double, c_int, c_int64, c_void_p
from enum import IntEnum

MAX_SLICES = 3

PHASES = (
    *("norm", "qkv", "rope", "attention", "o", "gate_up", "activation", "down", "head"),
    *("shrink", "affine", "exchange", "route"),
)
"""Phases that a profile distinguishes, in the library's order."""


ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
"""Activations, in the library's order."""


class Exchange(IntEnum):
    """Exchange in the middle of a step between the ranks that hold a model together."""

    NOTHING = 0
    GATHER = 1
    """Gather the parts of ``h``: each rank has some rows of A."""
    SUM = 2
    """Add up ``h``: each rank has some of the inputs."""
    TOTAL = 3
    """Add up the outputs of a linear whose inputs are split; they are scaled and shifted afterwards."""


ExchangeFunction = CFUNCTYPE(c_int, c_int64, c_int64)
"""``exchange(what, id of a pool, or -1)``; other than 0 ends the step."""


class Part(Structure):
    """Rows of a weight that are stored alike, a whole number of panels; see ``src/blocks.h``."""

    _fields_ = [
        *(("format", c_int64), ("data", c_void_p), ("panels", c_int64), ("scale", c_void_p)),
        *(("zero", c_void_p), ("group_of", c_void_p), ("group", c_int64), ("middle", c_int64)),
    ]


class Kind(IntEnum):
    """Form in which a matrix is stored."""

    PACKED = 0
    INT8 = 1
    INT4 = 2
    PARTS = 3


class Matrix(Structure):
    """A packed linear: weight [n, k], and bias [n] or null. int8 and int4 weights also have a scale [n], and
    with int8 activations initial values of the sums [n]. A weight in parts has the parts instead."""

    _fields_ = [
        *(("packed", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64), ("kind", c_int64)),
        *(("panel_bytes", c_int64), ("scale", c_void_p), ("start", c_void_p), ("rotation", c_int64)),
        *(("group", c_int64), ("part", c_void_p), ("parts", c_int64)),
    ]


class Slots(Structure):
    """The memory of all slots, and the table of :class:`aioengine.kernels.slots.SlotMemory`."""

    _fields_ = [
        *(("memory", c_void_p), ("table", c_void_p), ("places", c_int64), ("int8", c_int64)),
        ("turned", c_int64),
    ]


class Gate(Structure):
    """An activation, and where it writes what it makes of gates and what these are for."""

    _fields_ = [
        *(("bf16", c_int64), ("activation", c_int64), ("alpha", c_double), ("limit", c_double)),
        ("out", c_void_p),
    ]


class HeadNorms(Structure):
    """Norms of queries and keys, of so many elements together."""

    _fields_ = [
        *(("q", c_void_p), ("k", c_void_p), ("q_size", c_int64), ("k_size", c_int64)),
        *(("rounded", c_int64), ("eps", c_double), ("offset", c_double)),
    ]


class LoraSlice(Structure):
    """One slice of a fused linear: its outputs, and the first column of these."""

    _fields_ = [("out", c_int64), ("offset", c_int64)]


class LoraPool(Structure):
    """A fused linear's places in the slots; no slices: no adapter may target it."""

    _fields_ = [
        *((name, c_int64) for name in ("slices", "first", "exchange", "id")),
        ("slice", LoraSlice * MAX_SLICES),
    ]


class Mixture(Structure):
    """A layer's experts, whose matrices are one below the other, their router, and a shared expert."""

    _fields_ = [
        *((name, c_int64) for name in ("experts", "per_token", "size", "normalized", "shared_size")),
        ("router", c_void_p),
        ("router_bias", c_void_p),
        ("shared_gate", c_void_p),
        *((name, Matrix) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        *((f"lora_{name}", LoraPool) for name in ("router", "gate_up", "down")),
        *((f"lora_shared_{name}", LoraPool) for name in ("gate_up", "down", "gate")),
    ]


class Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "attention_norm", "q_norm", "k_norm")),
        *((name, c_void_p) for name in ("mlp_input_norm", "mlp_norm", "sinks")),
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, LoraPool) for name in ("lora_qkv", "lora_o", "lora_gate_up", "lora_down")),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
        ("rope", c_int64),
        ("mixture", POINTER(Mixture)),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("bf16", "layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, c_int64) for name in ("intermediate", "block_size", "int8_cache")),
        *((name, c_int64) for name in ("rope_half", "rope_neighbours", "q_norm_size", "k_norm_size")),
        *((name, c_int64) for name in ("activation", "norm_rounded")),
        *((name, c_double) for name in ("eps", "norm_offset", "residual_scale")),
        *((name, c_double) for name in ("attention_scale", "attention_cap")),
        *((name, c_double) for name in ("swiglu_alpha", "swiglu_limit")),
        *(("norm", c_void_p), ("rotations", c_int64), ("embedding", c_void_p), ("embedding_packed", c_int64)),
        ("head", Matrix),
        ("lora_head", LoraPool),
        ("slots", Slots),
        ("layer", POINTER(Layer)),
    ]


class LoraBatch(Structure):
    """Segments [count][slot, begin, end, rank, weight] of int32 and a float32; ``width``: what A's outputs
    have room for."""

    _fields_ = [
        ("segments", c_void_p),
        ("count", c_int64),
        ("width", c_int64),
        ("affine", c_void_p),
        ("affine_count", c_int64),
    ]


class Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("tokens", "sequences", "table_width", "samples", "threads")),
        *((name, c_void_p) for name in ("token_ids", "tables", "spans", "angles_cos", "angles_sin")),
        *((name, c_int64) for name in ("positions", "embedded")),
        *((name, c_void_p) for name in ("hidden", "cos", "sin", "cells", "last")),
        ("sample_rows", c_void_p),
        ("lora", LoraBatch),
        ("sample_lora", LoraBatch),
        *((name, c_void_p) for name in ("logits", "best", "x", "wide", "narrow", "h")),
        *((name, c_void_p) for name in ("rows", "rows_wide", "rows_narrow", "rows_h")),
        *((name, c_void_p) for name in ("scores", "weights", "gates", "routes")),
        ("seconds", c_void_p),
        ("exchange", ExchangeFunction),
    ]
