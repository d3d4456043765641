"""One adapter of each PEFT method, and the table of docs/adapters.md that says what becomes of it."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support.peft_files import CONFIG, base_model, read

from aioengine.errors import AdapterError

TARGETS = ["q_proj", "v_proj", "up_proj"]
FOLDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10},
    "LOHA": {"r": 3, "alpha": 5},
    "LOKR": {"r": 2, "alpha": 5, "decompose_factor": 4},
    "VERA": {"r": 8, "d_initial": 0.5},
}
"""``peft_type`` -> settings of an adapter that is folded into one of rank 16 at most."""
VARIANTS: dict[str, dict[str, Any]] = {
    "LORA": {},
    "LORA, `use_rslora`": {"use_rslora": True},
    "LORA, `use_dora`": {"use_dora": True},
    "LORA, `lora_bias`": {"lora_bias": True},
    "LORA, `rank_pattern`": {"rank_pattern": {"q_proj": 2}},
    'LORA, `init_lora_weights="gaussian"`': {"init_lora_weights": "gaussian"},
    'LORA, `init_lora_weights="orthogonal"`': {"init_lora_weights": "orthogonal"},
    'LORA, `init_lora_weights="eva"`': {"init_lora_weights": "eva"},
    'LORA, `init_lora_weights="pissa"`': {"init_lora_weights": "pissa"},
    "LORA, PiSSA that PEFT converted when it was saved": {"init_lora_weights": "pissa", "converted": True},
    'LORA, `init_lora_weights="olora"`': {"init_lora_weights": "olora"},
    "LORA, OLoRA that PEFT converted when it was saved": {"init_lora_weights": "olora", "converted": True},
    'LORA, `init_lora_weights="corda"`': {"init_lora_weights": "corda"},
    'LORA, `init_lora_weights="loftq"`': {"init_lora_weights": "loftq"},
    "LORA, `use_qalora`": {"use_qalora": True},
    "LORA, `alora_invocation_tokens`": {"alora_invocation_tokens": [1, 2]},
    "LORA, `trainable_token_indices`": {"trainable_token_indices": [1, 2]},
    "LORA, `modules_to_save` of a head": {"modules_to_save": ["score"], "head": True},
    "LORA, `modules_to_save` of `lm_head`": {"modules_to_save": ["lm_head"]},
    "LORA, `target_parameters`": {"target_parameters": ["mlp.experts.down_proj"]},
    "LORA, `layer_replication`": {"layer_replication": [[0, 2], [1, 2]]},
    'LORA, `bias="all"`': {"bias": "all"},
}
"""What is called in the table -> settings of a LoRA adapter."""
PLACES = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
HEADING = "| method | served | how, or what to do |\n|---|---|---|\n"


def save(folder: Path, method: str, **options: Any) -> Any:
    """Save a random adapter of ``method``. Returns PEFT's model."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)](target_modules=TARGETS, **options)
    model = peft.get_peft_model(base_model(), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_", "vera_lambda")):
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(str(folder))
    return model


def changes(model: Any) -> dict[tuple[int, str], torch.Tensor]:
    """The weight change [out, in] that PEFT computes for each adapted linear."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            found[layer, name.rpartition(".")[2]] = module.get_delta_weight("default").detach()
    return found


def rows() -> Iterator[tuple[list[str], str, str]]:
    """(what is called so, whether it is served, how or what to do instead); methods that differ in nothing
    are one row."""
    for called, options in VARIANTS.items():
        yield [called], *_outcome("LORA", options)
    others: dict[tuple[str, str], list[str]] = {}
    for method in sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value != "LORA"):
        others.setdefault(_outcome(method, FOLDED.get(method)), []).append(method)
    for outcome, methods in others.items():
        yield methods, *outcome


def table() -> str:
    return HEADING + "".join(
        f"| {', '.join(called)} | {served} | {how} |\n" for called, served, how in rows()
    )


def _outcome(method: str, options: dict[str, Any] | None) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        _write(folder, method, options)
        base = base_model()
        try:
            packed = read(folder, base_weight=lambda module: base.get_parameter(PLACES[module]).detach())
        except AdapterError as error:
            return "no", _advice(str(error))
    if method == "LORA":
        return "yes", ""
    assert options is not None
    trained = options.get("r", options.get("init_r"))
    return "folded", f"rank {trained} gives a pair of rank {packed.rank} for a tiny model"


def _write(folder: Path, method: str, options: dict[str, Any] | None) -> None:
    """A configuration and weights, or the configuration alone where that is refused already."""
    if method != "LORA":
        if options is not None:
            save(folder, method, **options)
            return
        (folder / CONFIG).write_text(json.dumps({"peft_type": method}))
        return
    options = {"r": 4, "lora_alpha": 6, **(options or {})}
    head, converted = options.pop("head", False), options.pop("converted", False)
    init = options.get("init_lora_weights")
    plain = options | ({"init_lora_weights": True} if init in ("eva", "corda", "loftq") else {})
    if head or "target_parameters" in options or "layer_replication" in options:
        peft.LoraConfig(target_modules=TARGETS, **options).save_pretrained(str(folder))
        if head:
            _with_head(folder, options)
        return
    model = peft.get_peft_model(base_model(), peft.LoraConfig(target_modules=TARGETS, **plain))
    if converted:
        started = folder / "start"
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(str(started))
        model.peft_config["default"].init_lora_weights = init
        model.save_pretrained(str(folder), path_initial_model_for_weight_conversion=str(started))
        return
    model.peft_config["default"].init_lora_weights = options.get("init_lora_weights", True)
    model.save_pretrained(str(folder))


def _with_head(folder: Path, options: dict[str, Any]) -> None:
    from transformers import LlamaForSequenceClassification

    config = peft.LoraConfig(target_modules=TARGETS, task_type="SEQ_CLS", **options)
    causal = base_model().config
    causal.num_labels = 3
    peft.get_peft_model(LlamaForSequenceClassification(causal), config).save_pretrained(str(folder))


def _advice(error: str) -> str:
    """The reason without what is the file's."""
    reason = error.partition("adapter_config.json: ")[2] or error
    field, _, rest = reason.partition(": ")
    return (rest if "=" in field else reason).strip()
