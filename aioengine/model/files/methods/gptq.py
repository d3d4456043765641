"""GPTQ (Frantar et al., 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write it.

``qweight`` [k / 8, n] has eight codes of 4 bits along the inputs in each int32, the lowest first; ``qzeros``
[groups, n / 8] the zero points along the outputs, less one in the first version of the format; ``scales``
[groups, n]; ``g_idx`` [k] the group of each input, which need not be neighbours ("act-order", ``desc_act``).
With 8 bits there are four to an int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.model.files.methods import scheme
from aioengine.model.files.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> what is to be added to the zero points."""


class GPTQ:
    """The scheme "gptq"."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._wrong = wrong = scheme.Wrong(path, "gptq")
        self._bits = scheme.integer(config, "bits", wrong)
        if self._bits not in (4, 8):
            raise wrong.setting(
                "bits", self._bits, "4 and 8 are supported; use a checkpoint with one of them"
            )
        group = scheme.integer(config, "group_size", wrong, -1)
        self._group = 0 if group == -1 else group
        self._ordered = bool(config.get("desc_act", False))
        version = config.get("checkpoint_format", "gptq")
        if version not in _FORMATS:
            raise wrong.setting(
                "checkpoint_format", version, f"supported: {', '.join(_FORMATS)}; convert it to one of them"
            )
        dynamic = config.get("dynamic") or {}
        # Patterns with a minus are of modules that are not quantized, which their tensors show.
        if not isinstance(dynamic, dict) or any(not name.startswith("-:") for name in dynamic):
            raise wrong.setting("dynamic", "{...}", "settings that differ between modules are not supported")
        self._added = _FORMATS[version]

    def layout(self, module: str, headers: Mapping[str, scheme.Header]) -> scheme.Layout | None:
        if "qweight" not in headers:
            return None
        name, each = f"{module}.qweight", 32 // self._bits
        words, n = self._wrong.matrix(name, headers["qweight"])
        k = words * each
        scheme.check_group(self._group, k, name, self._wrong)
        format = "int4" if self._bits == 4 else "int8"
        packing = Packing(format=format, group=self._group, zeros=True, ordered=self._ordered)
        expected: scheme.Expected = {
            "qweight": ((words, n), ("I32",)),
            "qzeros": ((packing.groups(k), n // each), ("I32",)),
            "scales": ((packing.groups(k), n), scheme.FLOATS),
        }
        if self._ordered or "g_idx" in headers:
            expected["g_idx"] = ((k,), ("I32",))
        self._wrong.check(module, headers, expected)
        return scheme.Layout(n, k, packing)

    def fields(self, module: str, layout: scheme.Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        words = tensors["qweight"].T.contiguous()
        zero = scheme.unpack_int32(tensors["qzeros"], self._bits).short() + self._added
        data = words.view(torch.uint8)
        if self._bits == 8:  # kept as signed bytes
            data, zero = data ^ 128, zero - 128
        found = {"data": data, "scale": tensors["scales"].T.float(), "zero": zero.T}
        group_of = tensors.get("g_idx")
        usual = torch.arange(layout.k, dtype=torch.int32) // (layout.packing.group or layout.k)
        if layout.packing.ordered:
            assert group_of is not None
            if len(group_of) and not 0 <= int(group_of.min()) <= int(group_of.max()) < len(tensors["scales"]):
                raise self._wrong.tensor(f"{module}.g_idx", "names groups that do not exist")
            found["group_of"] = group_of
        elif group_of is not None and not torch.equal(group_of, usual):
            raise self._wrong.tensor(
                f"{module}.g_idx", "has groups of inputs that are not neighbours, but desc_act is false"
            )
        return found
