"""The compiled library's functions, with their argument types, and whether it may be used here."""

from __future__ import annotations

import ctypes
import functools
import logging
import re
from ctypes import c_float, c_int, c_long, c_void_p
from pathlib import Path

import torch  # noqa: F401 # before the library: its OpenMP runtime must be the one that both use

from aioengine.kernels.cpu.build import PREBUILT, Unavailable, better_level, compiled, described_level, levels

logger = logging.getLogger("aioengine")

_SIGNATURES = {
    "aio_pack": (c_int, c_void_p, c_void_p, c_long, c_long, c_int),
    "aio_gather": (c_int, c_void_p, c_void_p, c_void_p, c_long, c_long, c_int),
    "aio_product": (c_int, c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_long, c_int),
    "aio_quantize": (*(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long, c_int),),
    "aio_dequantize": (*(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long, c_int),),
    "aio_turn_blocks": (c_void_p, c_long, c_long, c_long, c_long, c_long, c_int),
    "aio_expand_rows": (c_int, c_void_p, c_void_p, c_void_p, c_long, c_long, c_int),
    "aio_quantize_int4": (
        *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long, c_long, c_int),
    ),
    "aio_dequantize_int4": (
        *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_long, c_long, c_int),
    ),
    "aio_attention": (
        *(c_int, c_void_p, c_long, c_void_p, c_void_p, c_void_p, c_long, c_void_p, c_long, c_void_p),
        *(c_long, c_long, c_long, c_long, c_long, c_float, c_float, c_void_p, c_int, c_int),
    ),
    "aio_rope_store": (
        *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        *(c_long, c_long, c_long, c_long, c_long, c_long, c_int, c_int, c_void_p, c_int),
    ),
    "aio_add_rms_norm": (
        *(c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_long, c_float, c_float, c_int),
        *(c_float, c_int),
    ),
    "aio_activate": (c_void_p, c_void_p, c_long, c_long, c_int),
    "aio_soft_cap": (c_int, c_void_p, c_long, c_float, c_int),
    "aio_argmax": (c_int, c_void_p, c_long, c_long, c_void_p, c_int),
    "aio_lora_shrink": (
        *(c_int, c_void_p, c_long, c_void_p, c_long, c_void_p, c_long, c_long, c_long),
        *(c_void_p, c_long, c_int),
    ),
    "aio_lora_expand": (
        *(c_int, c_void_p, c_void_p, c_long, c_void_p, c_long, c_long, c_void_p, c_long),
        *(c_void_p, c_long, c_int),
    ),
    "aio_turn": (c_void_p, c_long, c_void_p, c_long),
    "aio_lora_affine": (
        *(c_int, c_void_p, c_long, c_void_p, c_long, c_void_p, c_long, c_void_p, c_long, c_int),
    ),
    "aio_step": (c_void_p, c_void_p),
}


@functools.cache
def load(level: str | None = None) -> ctypes.CDLL:
    """Load the library, and compile it first if necessary. ctypes releases the GIL while its functions run.

    ``level``: see :func:`aioengine.kernels.cpu.build.compiled`.

    If a prebuilt library cannot be loaded here, because it needs a newer C library, it is compiled here.

    Raises Unavailable if it cannot be compiled or loaded, or would bring a second OpenMP runtime: two of
    them in one process fight for the cores, and everything becomes several times slower.
    """
    path = compiled(level)
    before = openmp_runtimes()
    if len(before) > 1:
        logger.warning(
            "two OpenMP runtimes are in this process (%s): they fight for the cores, and every step becomes "
            "several times slower; find out what brings the second one, and load torch before it",
            ", ".join(sorted(before)),
        )
    try:
        loaded = _open(path)
    except Unavailable as error:
        if path.parent != PREBUILT:
            raise
        logger.warning("%s; the kernels are compiled here instead", error)
        loaded = _open(compiled(level, use_prebuilt=False))
    second = openmp_runtimes() - before
    if second:
        raise Unavailable(
            f"the kernels would bring a second OpenMP runtime ({', '.join(second)}) beside torch's "
            f"({', '.join(before)}); set CXX to a compiler that uses the same one"
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    if level is None and better_level() is not None:
        logger.warning("the CPU kernels run at the level %s", described_level())
    return loaded


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error


def has_int8_products() -> bool:
    """Whether this CPU multiplies int8 faster than bfloat16, as all with AVX2 do."""
    return next(iter(levels())) != "generic"


def openmp_runtimes() -> set[str]:
    """Return the files of the OpenMP runtimes in this process; on Linux only, elsewhere none."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            return set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\b\S*)", maps.read()))
    except OSError:
        return set()
