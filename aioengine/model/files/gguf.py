"""GGUF files: the model's shape, and its tensors under Hugging Face names.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read with the ``gguf`` package
(extra ``gguf``), which is imported only when a file is opened. Opening parses the whole vocabulary
and takes seconds on large files, so functions here take an open :class:`GGUFFile`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch

from aioengine.errors import ConfigError
from aioengine.kernels.portable import dequantize as blocks
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.gguf_config import (
    ARCHITECTURES,
    PERMUTED,
    ROW,
    config_of,
    family_of,
    module_names,
)
from aioengine.model.files.hf.config_file import ConfigFile
from aioengine.model.files.hf_config import parse_config
from aioengine.model.files.packing import MXFP4, Packing, of_gguf
from aioengine.model.files.quantized import with_packed
from aioengine.model.spec import ModelSpec, RopeSpec

if TYPE_CHECKING:
    from gguf import ReaderTensor

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_EXPERTS = re.compile(r"blk\.(\d{1,6})\.ffn_(gate|up|down)_exps\.(weight|bias)", re.ASCII)
"""Names of the tensors [experts, out, in] and [experts, out] of a layer's experts."""
_SINKS = re.compile(r"blk\.(\d{1,6})\.attn_sinks\.weight", re.ASCII)
_ROPE_FACTORS, _SHORT_FACTORS, _LONG_FACTORS = (
    *("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"),
)
"""Tensors with a divisor for each frequency, as Llama 3 has them, and with those of LongRoPE. They go into
the spec; they are no parameters."""


class GGUFFile:
    """One open (memory-mapped) GGUF file: metadata by key, tensors by name.

    Raises :class:`~aioengine.errors.ConfigError` if the ``gguf`` package is missing, or the file is
    missing, malformed or one part of a split model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import gguf as _  # noqa: F401  (whose absence has a message of its own)

            from aioengine.model.files.gguf_reader import FastReader, contents
        except ImportError as e:
            raise ConfigError(
                f"{self.path}: reading GGUF needs the package 'gguf', which is not installed; "
                "run: pip install 'aioengine[gguf]'"
            ) from e
        try:
            reader = FastReader(self.path, "c")  # copy on write: torch warns of what cannot be written to
        except (OSError, ValueError, KeyError, IndexError) as e:
            raise ConfigError(f"{self.path}: not a readable GGUF file: {e}") from e
        self._fields, self._contents = reader.fields, contents
        self.tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}
        if self.get("split.count", 1) > 1:
            raise ConfigError(
                f"{self.path}: one part of a model split in {self.get('split.count')} files; "
                "join them with llama-gguf-split --merge and give the result"
            )

    @functools.cached_property
    def arch(self) -> str:
        """The architecture. Raises ConfigError if it is not known."""
        arch = str(self.require("general.architecture"))
        if arch not in ARCHITECTURES:
            raise ConfigError(
                f"{self.path}: architecture {arch!r} is not supported; supported in GGUF: "
                f"{', '.join(ARCHITECTURES)}"
            )
        return arch

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """The modules of a layer: their names in the file, and those that Hugging Face has."""
        return module_names(family_of(self.arch, self.of_model))

    def of_model(self, key: str) -> Any:
        """Return the value of a metadata key of the architecture; None if there is none."""
        value = self.get(f"{self.arch}.{key}")
        return _decimal(value) if isinstance(value, float) else value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a metadata key (str, number, bool or list), or ``default``."""
        field = self._fields.get(key)
        try:
            return default if field is None else self._contents(field)
        except ValueError as e:
            raise ConfigError(f"{self.path}: metadata key {key!r} is not readable: {e}") from e

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja chat template, if the file has one."""
        template = self.get("tokenizer.chat_template")
        return None if template is None else str(template)

    def require(self, key: str) -> Any:
        """Return the value of a metadata key; ConfigError if the file does not have it."""
        value = self.get(key)
        if value is None:
            raise ConfigError(f"{self.path}: metadata key {key!r} is missing; convert the model again")
        return value


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """Return the ``config.json`` of the same model in Hugging Face's format. Raises ConfigError."""
    eos = (file.get(f"tokenizer.ggml.{key}") for key in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return {
        **config_of(file.arch, file.of_model, file.path),
        "vocab_size": int(_tensor(file, "token_embd.weight").shape[1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(int(token) for token in eos if token is not None)),
    }


def read_spec(file: GGUFFile) -> ModelSpec:
    """Return the model's shape, from metadata and the tensor directory; no weights are read.

    ``dtype`` is that of the unquantised matrices, and bfloat16 for quantised files. Raises
    ConfigError for an unsupported architecture, RoPE variant, or layers of unequal shape.
    """
    spec = parse_config(ConfigFile(file.path, raw=hf_config(file)))
    fixed = {"attention.value_length": spec.head_dim}
    fixed["rope.dimension_count"] = spec.rotary_dim or spec.head_dim
    for key, size in fixed.items():
        if (file.of_model(key) or size) != size:
            raise ConfigError(
                f"{file.path}: {file.arch}.{key}={file.of_model(key)}: only the head dimension, {size}, is "
                "supported"
            )
    qkv = "attn_qkv" if spec.fused_qkv else "attn_q"
    rope = _rope_of_divisors(file, spec)
    shown: dict[str, Any] = {
        "qkv_bias": f"blk.0.{qkv}.bias" in file.tensors,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "dtype": _stored_dtype(file, f"blk.0.{qkv}.weight"),
    }
    if rope is not None:
        shown |= {"rope": rope, "max_position": min(spec.max_position, rope.original_max_position)}
    if spec.family.startswith("gemma"):
        shown["norm_offset"] = 0.0  # their norms' weights have the 1
    spec = msgspec.structs.replace(spec, **shown)
    packings = {name.removesuffix(".weight"): stored.packing for name, stored in iter_stored(file, spec)}
    return with_packed(spec, {name: packing for name, packing in packings.items() if packing is not None})


class StoredTensor:
    """A parameter of a file, under its Hugging Face name."""

    def __init__(self, file: GGUFFile, name: str, spec: ModelSpec, expert: int | None = None) -> None:
        self._file, self._name, self._expert = file, name, expert
        self._tensor = file.tensors[name]
        self._heads: int | None = None
        """Number of heads of q or k, whose rows are in another order than in Hugging Face's files; None for
        other tensors."""
        self._head_dim = spec.head_dim
        self._is_row = f".{ROW}." in name and len(self._tensor.shape) == 1
        if file.arch in PERMUTED:
            if name.endswith((".attn_q.weight", ".attn_q.bias")):
                self._heads = spec.num_heads
            elif name.endswith((".attn_k.weight", ".attn_k.bias")):
                self._heads = spec.num_kv_heads

    @property
    def shape(self) -> tuple[int, ...]:
        whole = tuple(int(n) for n in reversed(self._tensor.shape))
        return (1, *whole) if self._is_row else whole if self._expert is None else whole[1:]

    @property
    def packing(self) -> Packing | None:
        """Format in which it stays in memory, if it is a quantized matrix of a known format; else None."""
        return _packing(self._tensor, self._expert)

    def tensor(self) -> torch.Tensor:
        """Return its values in their dtype; quantized ones are converted to float32."""
        return self._ordered(_to_torch(self._file, self._tensor, self._expert)).reshape(self.shape)

    def blocks(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a quantized weight, under the names that ``BlockWeight`` has for them."""
        whole = self._tensor.data
        data = torch.from_numpy(whole if self._expert is None else whole[self._expert])
        found = blocks.split_mxfp4(data) if self.packing == MXFP4 else {"data": data}
        return {name: self._ordered(tensor) for name, tensor in found.items()}

    def _ordered(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._heads is None:
            return tensor
        return _half_split_rows(self._file, self._name, tensor, self._heads, self._head_dim)


def iter_stored(file: GGUFFile, spec: ModelSpec) -> Iterator[tuple[str, StoredTensor]]:
    """Yield every parameter by its Hugging Face name.

    The q and k rows of the ``llama`` architecture are put back into the Hugging Face order. Raises
    ConfigError for a tensor that the Llama family does not have.
    """
    for name in file.tensors:
        if isinstance(spec, MixtureSpec) and (found := _EXPERTS.fullmatch(name)):
            for expert in range(int(file.tensors[name].shape[-1])):
                block, kind = spec.names.block, getattr(spec.names, found[2])
                module = f"model.layers.{int(found[1])}.{block}.experts.{expert}.{kind}"
                yield f"{module}.{found[3]}", StoredTensor(file, name, spec, expert)
        elif name not in (_ROPE_FACTORS, _SHORT_FACTORS, _LONG_FACTORS):
            yield _hf_name(file, name), StoredTensor(file, name, spec)


def _packing(stored: ReaderTensor, expert: int | None = None) -> Packing | None:
    is_matrix = len(stored.shape) == (2 if expert is None else 3)
    return of_gguf(stored.tensor_type.name) if is_matrix else None


def _hf_name(file: GGUFFile, name: str) -> str:
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    if sinks := _SINKS.fullmatch(name):
        return f"model.layers.{sinks[1]}.self_attn.sinks"
    match name.split("."):
        case ["blk", layer, module, ("weight" | "bias") as kind] if module in file.modules:
            return f"model.layers.{layer}.{file.modules[module]}.{kind}"
    raise ConfigError(f"{file.path}: tensor {name!r} is not part of a supported architecture")


def _to_torch(file: GGUFFile, stored: ReaderTensor, expert: int | None = None) -> torch.Tensor:
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize

    data = stored.data if expert is None else stored.data[expert]
    if stored.tensor_type in (Type.F32, Type.F16):
        return torch.from_numpy(np.array(data))  # a copy: the file is mapped read-only
    if stored.tensor_type == Type.BF16:
        return torch.from_numpy(np.array(data).view(np.int16)).view(torch.bfloat16)
    packing = _packing(stored, expert)
    if packing is not None and not packing.grouped:
        return blocks.dequantize(packing.format, torch.from_numpy(data))
    try:
        return torch.from_numpy(np.ascontiguousarray(dequantize(data, stored.tensor_type)))
    except NotImplementedError as e:
        raise ConfigError(
            f"{file.path}: tensor {stored.name!r} is stored as {stored.tensor_type.name}, which the "
            "installed 'gguf' package cannot expand; upgrade it, or use a Q8_0, K-quant or F16 file"
        ) from e


def _half_split_rows(
    file: GGUFFile, name: str, tensor: torch.Tensor, heads: int, head_dim: int
) -> torch.Tensor:
    """Undo the converter's reordering: in each head, rows (0, d/2, 1, d/2+1, ...) -> (0, 1, ...).

    GGUF's ``llama`` rotates neighbouring pairs; Hugging Face rotates element i with i + d/2.
    """
    if tensor.shape[0] != heads * head_dim:
        raise ConfigError(
            f"{file.path}: tensor {name!r} has {tensor.shape[0]} rows, expected {heads * head_dim}"
        )
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape).contiguous()


def _tensor(file: GGUFFile, name: str) -> ReaderTensor:
    if name not in file.tensors:
        raise ConfigError(f"{file.path}: tensor {name!r} is missing; convert the model again")
    return file.tensors[name]


def _decimal(value: float) -> float:
    """Return the shortest decimal that the float32 ``value`` stands for: 9.9999997e-06 -> 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _stored_dtype(file: GGUFFile, tensor: str) -> Literal["bfloat16", "float16", "float32"]:
    name = _tensor(file, tensor).tensor_type.name
    return "float32" if name == "F32" else "float16" if name == "F16" else "bfloat16"


def _rope_of_divisors(file: GGUFFile, spec: ModelSpec) -> RopeSpec | None:
    """Return the rotation of a file that has divisors as a tensor; None if it has none."""
    name = next((name for name in (_ROPE_FACTORS, _SHORT_FACTORS) if name in file.tensors), None)
    if name is None:
        return None
    values = tuple(map(_decimal, _to_torch(file, _tensor(file, name)).tolist()))
    pairs = (spec.rotary_dim or spec.head_dim) // 2
    if len(values) != pairs:
        raise ConfigError(f"{file.path}: tensor {name!r} has {len(values)} numbers, expected {pairs}")
    original = factor = None
    if name == _SHORT_FACTORS:
        original = file.of_model("rope.scaling.original_context_length")
        factor = file.of_model("rope.scaling.attn_factor")
    return RopeSpec(
        type="longrope",
        theta=spec.rope.theta,
        original_max_position=original or spec.max_position,
        attention_factor=factor or 1.0,
        divisors=values,
    )
