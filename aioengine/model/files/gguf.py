"""GGUF files: the model's shape, and its tensors under Hugging Face names.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, read with the ``gguf`` package
(extra ``gguf``), which is imported only when a file is opened. Opening parses the whole vocabulary
and takes seconds on large files, so functions here take an open :class:`GGUFFile`.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch

from aioengine.errors import ConfigError
from aioengine.kernels.portable.dequantize import split_mxfp4
from aioengine.model.files.gguf_config import ARCHITECTURES, PERMUTED, config_of
from aioengine.model.files.hf.config_file import ConfigFile
from aioengine.model.files.hf_config import parse_config
from aioengine.model.files.packing import MXFP4, of_gguf
from aioengine.model.files.quantized import with_packed
from aioengine.model.files.stored import Checkpoint, Stored, StoredBlocks
from aioengine.model.spec import ModelSpec, RopeSpec

if TYPE_CHECKING:
    from gguf import ReaderTensor
    from numpy.typing import NDArray

_EXPERT = re.compile(r"\.experts\.\d+\.", re.ASCII)
_ROW = "ffn_gate_inp_shexp"
"""Linear with one output, of which files have the weight as a vector."""
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
    return with_packed(spec, read_file(file, spec))


def read_file(file: GGUFFile, spec: ModelSpec) -> Checkpoint:
    """Return the parameters of a file, of which nothing is read yet.

    Where rows of q and k are in GGUF's order, they are put back into Hugging Face's. Raises ConfigError for a
    tensor that the family does not have.
    """
    modules, found = _modules(file, spec), Checkpoint()
    heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads} if file.arch in PERMUTED else {}
    for name, tensor in file.tensors.items():
        path, _, kind = name.rpartition(".")
        if name in (_ROPE_FACTORS, _SHORT_FACTORS, _LONG_FACTORS):
            continue
        own = modules.get(path, [])
        shape, stacked = tuple(int(n) for n in reversed(tensor.shape)), path.endswith("_exps")
        if not own or kind not in ("weight", "bias") or (stacked and len(own) != shape[0]):
            raise ConfigError(f"{file.path}: tensor {name!r} is not part of a supported architecture")
        shape = shape[1:] if stacked else (1, *shape) if path.endswith(_ROW) and len(shape) == 1 else shape
        order = heads.get(path.rpartition(".")[2])
        if order and shape[0] != order * spec.head_dim:
            raise ConfigError(
                f"{file.path}: tensor {name!r} has {shape[0]} rows, expected {order * spec.head_dim}"
            )
        for module, data in zip(own, tensor.data if stacked else (tensor.data,), strict=True):
            own_name = module if module.endswith(".sinks") else f"{module}.{kind}"
            found[own_name] = _parameter(file.path, tensor, data, shape, order)
    return found


def _modules(file: GGUFFile, spec: ModelSpec) -> dict[str, list[str]]:
    """Return the names that Hugging Face has for what the file has under a name: several for experts."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.arch)
    known, found = get_tensor_name_map(arch, spec.num_layers), dict[str, list[str]]()
    names = ["model.norm", *(spec.module_name(*place) for place in spec.adaptable())]
    for layer in range(spec.num_layers):
        norms = [norm for norm in msgspec.structs.astuple(spec.norms) if norm is not None]
        others = [*norms, "self_attn.q_norm", "self_attn.k_norm", "self_attn.sinks"]
        names += [f"model.layers.{layer}.{name}" for name in others]
    for name in names:
        if (own := known.get_name(_EXPERT.sub(".experts.", name))) is not None:
            found.setdefault(own, []).append(name)
    found["output"] = ["lm_head"]  # also of Gemma, whose heads are all tied for the package
    return found


def _parameter(
    path: Path, tensor: ReaderTensor, data: NDArray[Any], shape: tuple[int, ...], heads: int | None
) -> Stored | StoredBlocks:
    """Return a parameter that is ``data`` in the file; ``heads``: of q or k, whose rows are in another order
    than in Hugging Face's files."""

    def ordered(rows: torch.Tensor) -> torch.Tensor:
        """Undo the converter's reordering: in each head, rows (0, d/2, 1, d/2+1, ...) -> (0, 1, ...).

        GGUF's ``llama`` rotates neighbouring pairs; Hugging Face rotates element i with i + d/2.
        """
        if heads is None:
            return rows
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return pairs.transpose(1, 2).reshape(rows.shape).contiguous()

    packing = of_gguf(tensor.tensor_type.name)
    if packing is None or data.ndim < 2:
        whole = functools.cache(lambda: ordered(_to_torch(path, tensor, data)).reshape(shape))
        return Stored(shape, lambda part: whole()[tuple(part)])

    def read() -> dict[str, torch.Tensor]:
        raw = torch.from_numpy(data)
        found = split_mxfp4(raw) if packing == MXFP4 else {"data": raw}
        return {name: ordered(rows) for name, rows in found.items()}

    return StoredBlocks(shape, packing, read)


def _to_torch(path: Path, stored: ReaderTensor, data: NDArray[Any]) -> torch.Tensor:
    import numpy as np
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import dequantize

    if stored.tensor_type in (Type.F32, Type.F16):
        return torch.from_numpy(data)
    if stored.tensor_type == Type.BF16:
        return torch.from_numpy(data).view(torch.bfloat16)
    try:
        return torch.from_numpy(np.ascontiguousarray(dequantize(data, stored.tensor_type)))
    except NotImplementedError as e:
        raise ConfigError(
            f"{path}: tensor {stored.name!r} is stored as {stored.tensor_type.name}, which the "
            "installed 'gguf' package cannot expand; upgrade it, or use a Q8_0, K-quant or F16 file"
        ) from e


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
    factors = _tensor(file, name)
    values = tuple(map(_decimal, _to_torch(file.path, factors, factors.data).tolist()))
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
