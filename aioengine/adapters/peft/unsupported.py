"""PEFT settings that cannot be served, and what to do about each."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from aioengine.adapters.peft.folder import invalid_config

# Initialisations that train A and B over the unchanged base model. The others (pissa, corda, olora,
# loftq, lora_ga) subtract the initial B @ A from the base weights, which the adapter file does not hold.
# PEFT resets the field to true when it converts such an adapter to plain LoRA on saving.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")

MERGE = "merge the adapter into the base model with PEFT's merge_and_unload, and serve that as a model"
_TRAIN = "train a LoRA adapter instead"
_CONVERT = (
    "peft.save_as_lora(path, model, rank=...) makes a LoRA adapter of many others; else merge it into the "
    "base model with PEFT's merge_and_unload, or train a LoRA adapter"
)

_UNSUPPORTED = {
    "layer_replication": f"layer replication changes the base model's depth: {MERGE}",
    "target_parameters": (
        "LoRA on bare parameters is supported only in models with experts, and in those that transformers "
        f"runs: train it with target_modules that name linears, or {MERGE}"
    ),
    "megatron_config": f"Megatron parallel layers are not supported: {MERGE}",
    "use_qalora": f"QA-LoRA pools its inputs, which is not supported: {_TRAIN}",
    "use_bdlora": f"block-diagonal LoRA is not supported: {MERGE}",
    "monteclora_config": f"MonteCLoRA is not supported: {MERGE}",
    "kasa_config": f"KaSA is not supported: {MERGE}",
    "arrow_config": f"Arrow routing is not supported: {_TRAIN}",
}
"""Fields that must have no effect, and the reason."""

# Fields that do not change what the saved A and B compute: provenance, training-only settings, and
# fan_in_fan_out, which tells how the *base* weight is stored (A is [r, in], B [out, r] anyway).
_NEUTRAL = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out"),
    *("inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config"),
)
_KNOWN = {*_NEUTRAL, *_UNSUPPORTED, "peft_type", "bias", "init_lora_weights"}


def refuse_unsupported(fields: Mapping[str, Any], used: Collection[str]) -> None:
    """Raise AdapterInvalid for what would change the computation in a way that this engine does not perform.
    ``used`` are the names of the fields that are read elsewhere."""
    peft_type, bias, init = map(fields.get, ("peft_type", "bias", "init_lora_weights"))
    if not isinstance(peft_type, str):
        invalid_config(f"peft_type={short(peft_type)}: expected 'LORA'; save the adapter with PEFT again")
    if peft_type != "LORA":
        invalid_config(
            f"peft_type={short(peft_type)}: only 'LORA' and methods that can be folded into it are "
            f"supported: {_CONVERT}"
        )
    for field, reason in _UNSUPPORTED.items():
        if fields.get(field):
            invalid_config(f"{field}={short(fields[field])}: {reason}")
    if bias not in (None, "none"):
        invalid_config(
            f"bias={short(bias)}: only 'none' is supported; trained biases cannot be swapped: {MERGE}"
        )
    if init is not None and not isinstance(init, bool) and init not in _PLAIN_INITS:
        invalid_config(
            f"init_lora_weights={short(init)}: expected a bool or one of {list(_PLAIN_INITS)}; "
            "other initialisations change the base model's weights, so that A and B alone are not "
            "the whole adapter: save it with PEFT's path_initial_model_for_weight_conversion, or set this to "
            "true if the served base model is the changed one (LoftQ: model.unload().save_pretrained)"
        )
    for field, value in fields.items():
        if field not in _KNOWN and field not in used and value:  # null, false, 0 and empty ones do nothing
            invalid_config(
                f"unknown field {field[:80]!r} = {short(value)} may change what the adapter "
                "computes; remove it if it is only a note"
            )


def short(value: object) -> str:
    """Return a value as JSON, cut to 80 characters, for messages."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
