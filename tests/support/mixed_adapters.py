"""What PEFT makes of mixes and scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from support.greedy import Greedy

from aioengine import RequestOutput


def scaled_model(model: Path, weights: Mapping[Path, float], auto: Any = None, **options: Any) -> Any:
    """PEFT's model with all of these adapters active, each scaled by its weight."""
    auto = transformers.AutoModelForCausalLM if auto is None else auto
    base = auto.from_pretrained(model, dtype=torch.float32, **options)
    names = {f"adapter{i}": (folder, weight) for i, (folder, weight) in enumerate(weights.items())}
    (first, (folder, _)), *others = names.items()
    found: Any = peft.PeftModel.from_pretrained(base, str(folder), adapter_name=first)
    for name, (folder, _) in others:
        found.load_adapter(str(folder), adapter_name=name)
    if others:
        found.base_model.set_adapter(list(names))
    for layer in found.modules():
        if isinstance(layer, LoraLayer):
            for name, (_, weight) in names.items():
                if name in layer.scaling:
                    layer.scaling[name] *= weight
    return found.eval()


def added_model(model: Path, weights: Mapping[Path, float]) -> Any:
    """PEFT's model with one adapter that ``add_weighted_adapter`` has made of these."""
    found = scaled_model(model, dict.fromkeys(weights, 1.0))
    names = [f"adapter{i}" for i in range(len(weights))]
    found.add_weighted_adapter(names, list(weights.values()), "mix", combination_type="cat")
    found.set_adapter("mix")
    return found.eval()


def check_mix(model: Any, mix: Mapping[str, float], tokens: list[int], output: RequestOutput) -> None:
    """Compare a greedy output for a mix of a model's adapters, and its logprobs, with what PEFT computes."""
    expected = scaled_model(model.folder, {model.adapters[name]: weight for name, weight in mix.items()})
    with torch.no_grad():
        logits = expected(torch.tensor([[*tokens, *output.token_ids[:-1]]])).logits[0, len(tokens) - 1 :]
    assert output.token_ids == logits.argmax(-1).tolist()
    found = torch.tensor([entry.logprob for entry in output.logprobs or ()])
    torch.testing.assert_close(found, logits.log_softmax(-1).amax(-1), rtol=1e-4, atol=1e-4)


def generated(model: Any, prompt: list[int], count: int) -> Greedy:
    """The most likely tokens, one after the other."""

    @torch.no_grad()
    def likeliest(tokens: tuple[int, ...]) -> list[int]:
        found: list[int] = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        return found

    return Greedy(likeliest, prompt, count)
