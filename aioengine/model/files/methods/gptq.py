"""Codes of 4 or 8 bits in words of int32: GPTQ (Frantar et al., 2022, arXiv:2210.17323), as AutoGPTQ and
GPTQModel write it, and AWQ (Lin et al., 2023, arXiv:2306.00978), as AutoAWQ does in its version "gemm".

``qweight`` has several codes in each word: along the inputs, the lowest first, [k / 8, n]; or, of AWQ, along
the outputs in another order, [k, n / 8]. ``qzeros`` [groups, n / 8] has the zero points along the outputs,
less one in GPTQ's first version; ``scales`` [groups, n]; ``g_idx`` [k] the group of each input, which need
not be neighbours ("act-order", ``desc_act``). With 8 bits there are four to a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.model.files.methods import scheme
from aioengine.model.files.packing import Packing
from aioengine.model.files.stored import Stored, StoredBlocks

if TYPE_CHECKING:
    from torch import Tensor

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> what is to be added to the zero points."""
_PLACE_OF = [0, 4, 1, 5, 2, 6, 3, 7]
"""The place in a word where AWQ has the code of each of eight outputs."""


def awq(path: Path, config: Mapping[str, Any]) -> scheme.BlocksOf:
    """Return the way of "awq"."""
    method = scheme.Method(path, "awq")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise method.setting("bits", bits, "only 4 is supported")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise method.setting("version", version, "only 'gemm' is supported; use a checkpoint of that version")
    group = scheme.integer(config, "group_size" if "group_size" in config else "q_group_size", method, -1)
    zeros = bool(config.get("zero_point", True))
    packing = Packing(format="int4", group=0 if group == -1 else group, zeros=zeros, middle=8)
    return _words(method, packing, along_outputs=True)


def gptq(path: Path, config: Mapping[str, Any]) -> scheme.BlocksOf:
    """Return the way of "gptq"."""
    method = scheme.Method(path, "gptq")
    bits, group = scheme.integer(config, "bits", method), scheme.integer(config, "group_size", method, -1)
    if bits not in (4, 8):
        raise method.setting("bits", bits, "4 and 8 are supported; use a checkpoint with one of them")
    version = config.get("checkpoint_format", "gptq")
    if version not in _FORMATS:
        raise method.setting("checkpoint_format", version, f"supported: {', '.join(_FORMATS)}")
    dynamic = config.get("dynamic") or {}
    # Patterns with a minus are of modules that are not quantized, which their tensors show.
    if not isinstance(dynamic, dict) or any(not name.startswith("-:") for name in dynamic):
        raise method.setting("dynamic", "{...}", "settings that differ between modules are not supported")
    packing = Packing(
        format="int4" if bits == 4 else "int8",
        group=0 if group == -1 else group,
        zeros=True,
        ordered=bool(config.get("desc_act", False)),
    )
    return _words(method, packing, add=_FORMATS[version])


def _words(
    method: scheme.Method, packing: Packing, *, add: int = 0, along_outputs: bool = False
) -> scheme.BlocksOf:
    """Return the way of codes in words, with ``add`` to be added to zero points."""
    bits = 4 if packing.format == "int4" else 8
    each = 32 // bits

    def blocks_of(module: str, stored: Mapping[str, Stored]) -> StoredBlocks | None:
        if "qweight" not in stored:
            return None
        k, n = words = method.matrix(f"{module}.qweight", stored["qweight"])
        k, n = (k, n * each) if along_outputs else (k * each, n)
        groups = packing.groups(k)
        expected: scheme.Expected = {"qweight": (words, ("I32",))}
        if packing.zeros:
            expected["qzeros"] = ((groups, n // each), ("I32",))
        expected["scales"] = ((groups, n), scheme.FLOATS)
        if packing.ordered or "g_idx" in stored:
            expected["g_idx"] = ((k,), ("I32",))

        def by_output(rows: Tensor) -> Tensor:
            """Return codes that are along the outputs, in their order: [rows, n / each] -> [n, rows]."""
            codes = scheme.unpack_int32(rows, bits)
            return (codes.view(len(rows), -1, 8)[:, :, _PLACE_OF].flatten(1) if along_outputs else codes).T

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            import torch

            if along_outputs:
                codes = by_output(tensors["qweight"]).contiguous()
                data = codes[:, 0::2] | codes[:, 1::2] << 4
            else:
                data = tensors["qweight"].T.contiguous().view(torch.uint8)
            signed = 128 if bits == 8 else 0  # kept as signed bytes
            found = {"data": data ^ signed, "scale": tensors["scales"].T.float()}
            if packing.zeros:
                found["zero"] = by_output(tensors["qzeros"]).short() + (add - signed)
            group_of, usual = tensors.get("g_idx"), torch.arange(k, dtype=torch.int32) // (packing.group or k)
            if packing.ordered:
                found["group_of"] = group_of = tensors["g_idx"]
                if not bool(((group_of >= 0) & (group_of < groups)).all()):
                    raise method.tensor(f"{module}.g_idx", "names groups that do not exist")
            elif group_of is not None and not torch.equal(group_of, usual):
                what = "has groups of inputs that are not neighbours, but desc_act is false"
                raise method.tensor(f"{module}.g_idx", what)
            return found

        return method.blocks(module, stored, (n, k), packing, expected, read)

    return blocks_of
