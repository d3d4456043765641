"""Makes the spec of a model's folder: builds the model without weights, and observes one pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch

from aioengine.errors import ConfigError
from aioengine.model.files.hf_config import special_tokens
from aioengine.model.generic.classes import TransformersClass
from aioengine.model.generic.spec import Adaptable, GenericSpec
from aioengine.model.generic.step import KeepsMore
from aioengine.model.generic.trace import Trace, has_matrices, is_linear, observe
from aioengine.model.generic.weights import linear_matrix
from aioengine.model.spec import DTYPE_BYTES, LinearShape, RopeSpec

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")
_UNBOUNDED = 2**20
_MOVING_ROPE = ("dynamic", "longrope")
"""Frequencies that depend on how long the longest sequence is."""
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def read_spec(path: Path, native_reason: str | None = None) -> GenericSpec:
    """Return the spec of the model in a folder, of which no weights are read.

    Raises ConfigError, with the reason, if transformers does not run it or the engine cannot serve it.
    """
    found = TransformersClass(path)
    model = found.on_meta()
    if getattr(model, "_is_stateful", False) and not _attends(found.text_config):
        raise found.no_keys_and_values(f"{type(model).__name__} is a recurrent or hybrid model")
    trace = _trace(found, model)
    kept = trace.kept
    if not all(shape.elements for shape in kept.values()):
        raise ConfigError(
            f"{path}/config.json: {type(model).__name__} would have keys and values of size 0; correct the "
            "numbers and sizes of its heads"
        )
    text = found.text_config
    head = getattr(model.get_output_embeddings(), "weight", None)
    end = getattr(text, "eos_token_id", None)
    bos, eos = special_tokens(
        path / "config.json",
        path / "generation_config.json",
        bos=getattr(text, "bos_token_id", None),
        eos=end,
        own=end,
    )
    return GenericSpec(
        family=found.config.model_type,
        architecture=type(model).__name__,
        vocab_size=int(text.vocab_size if head is None else head.shape[0]),
        hidden_size=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        num_heads=int(getattr(text, "num_attention_heads", 1)),
        num_kv_heads=max(shape.key_heads for shape in kept.values()),
        head_dim=max(shape.key_dim for shape in kept.values()),
        intermediate_size=_first(getattr(text, "intermediate_size", None)) or 4 * int(text.hidden_size),
        rms_norm_eps=1e-6,
        max_position=_max_position(text),
        rope=RopeSpec(),
        tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        dtype=_dtype(found.config, text),
        bos_token_id=bos,
        eos_token_ids=eos,
        adapted=(*_linears(model, trace), *_stacks(model, trace)),
        kv=tuple(kept[layer] for layer in sorted(kept)),
        layer_ids=tuple(sorted(kept)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        float32_parameters=_in_float32(model),
        flat=trace.flat,
        native_reason=native_reason,
    )


def _attends(text: Any) -> bool:
    """Return whether a model of a hybrid class has layers of attention alone, as some of Granite 4 are."""
    kinds = set(getattr(text, "layer_types", None) or ())
    return bool(kinds) and kinds <= _ATTENTION


def _trace(found: TransformersClass, model: Any) -> Trace:
    """Return a pass with the attention that may be the engine's, or with the model's own. Raises ConfigError
    if neither puts keys and values into a cache."""
    errors: list[str] = []
    for own_attention in (False, True):
        try:
            trace = observe(model, own_attention=own_attention)
        except KeepsMore as error:
            raise found.no_keys_and_values(str(error)) from error
        except Exception as error:  # whatever a model does
            errors.append(f"{type(error).__name__}: {str(error)[:200]}")
            continue
        if trace.flat or (own_attention and trace.kept):
            return trace
    why = (
        f"What its code raises: {'; '.join(errors)}" if errors else "It puts no keys and values into a cache"
    )
    raise ConfigError(
        f"{found.path}: {type(model).__name__} cannot be examined before it is loaded, but the memory plan "
        f"needs that; use a model of another class. {why}"
    )


def _linears(model: Any, trace: Trace) -> Iterator[Adaptable]:
    """Yield the linears through which each token goes once, as a row."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if is_linear(module) and trace.sees_all(name):
            n_out, n_in = linear_matrix(module).shape
            turned = not isinstance(module, torch.nn.Linear)
            yield Adaptable(
                name, "lm_head" if module is head else name, LinearShape(n_in, n_out), turned=turned
            )


def _stacks(model: Any, trace: Trace) -> list[Adaptable]:
    """Return the parameters of stacked experts [experts, n, m], and of the routers beside them, where each
    token goes to the module once, as a row."""
    owners = [(n, m) for n, m in model.named_modules() if has_matrices(m) and trace.sees_all(n)]
    found: list[Adaptable] = []
    beside = set()
    for owner, module in owners:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and owner in trace.routed:
                count, n, m = parameter.shape
                turned = bool(getattr(module, "is_transposed", False))  # as PEFT asks
                shape = LinearShape(n, m) if turned else LinearShape(m, n)
                found.append(Adaptable(owner, f"{owner}.{name}", shape, name, True, count, turned))
                beside.add(owner.rpartition(".")[0])
    stacked = {stack.owner for stack in found}
    for owner, module in owners:
        weight = module._parameters.get("weight")
        if owner.rpartition(".")[0] not in beside or owner in stacked or weight is None or weight.dim() != 2:
            continue
        if trace.widths[owner] == {weight.shape[1]}:
            found.append(Adaptable(owner, owner, LinearShape(*reversed(weight.shape)), bare=True))
    return found


def _in_float32(model: Any) -> int:
    """Return how many numbers transformers keeps in float32 where the model is in 16 bits."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(torch.bfloat16)]
    kept = (p for name, p in model.named_parameters() if any(re.search(one, name) for one in patterns))
    return sum(parameter.numel() for parameter in kept)


def _first(value: Any) -> int:
    """Return a number, or the first of those that layers have."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else 0


def _max_position(text: Any) -> int:
    """Return the number of positions. Where rotations depend on the longest sequence of a batch, it is cut to
    the length up to which they do not."""
    known = [getattr(text, name, None) for name in _POSITIONS]
    limit = next((int(value) for value in known if isinstance(value, int) and value > 1), _UNBOUNDED)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if one.get("rope_type", one.get("type")) in _MOVING_ROPE:
            original = one.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
    return limit


def _dtype(config: Any, text: Any) -> Literal["bfloat16", "float16", "float32"]:
    value = getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32"
    name = str(value).removeprefix("torch.")
    return cast(Literal["bfloat16", "float16", "float32"], name if name in DTYPE_BYTES else "float32")
