"""Adapters whose training has changed the base model, served on the base that was saved with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.tiny_models import ALL_MODULES

from aioengine.errors import AdapterInvalid

INITS: dict[str, dict[str, Any]] = {
    "loftq": {"loftq_config": peft.LoftQConfig(loftq_bits=4)},
    "pissa": {},
    "olora": {},
}


def loftq(
    weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What PEFT does on a GPU alone, with rounding in the place of its 4-bit floats: LoftQ (Li et al., 2023),
    one iteration. Returns the quantized weight, A and B."""
    step = weight.abs().max() / (2 ** (num_bits - 1) - 1)
    quantized = (weight / step).round() * step
    u, s, vh = torch.linalg.svd(weight - quantized, full_matrices=False)
    root = s[:reduced_rank].sqrt()
    return quantized, root[:, None] * vh[:reduced_rank], u[:, :reduced_rank] * root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", INITS)
@pytest.mark.slow
async def test_on_its_own_base(
    tiny: Tiny, tmp_path: Path, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    """PEFT starts it, its weights are trained (here: moved a little), and base and adapter are saved apart,
    as LoftQ's own scripts do."""
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", loftq)
    base, folder, prompt = tmp_path / "base", tmp_path / "adapter", prompt_of(0, 9)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=ALL_MODULES, init_lora_weights=init, **INITS[init])
    model: Any = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tiny.model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(str(folder))
    shutil.copytree(tiny.model, base)
    model.unload().save_pretrained(str(base))
    served = Tiny(base, {"x": folder})
    settings = folder / "adapter_config.json"
    own = json.loads(settings.read_text())
    async with make_engine(served) as engine:
        with pytest.raises(AdapterInvalid, match=rf"init_lora_weights=.{init}.*true"):
            await engine.load_adapter("x", folder)
        settings.write_text(json.dumps(own | {"init_lora_weights": True}))
        await engine.load_adapter("x", folder)
        found = (await engine.complete(prompt, greedy(16), adapter="x")).token_ids
    assert found == served.expected(prompt, 16, "x") != served.expected(prompt, 16)
    assert served.expected(prompt, 16) != tiny.expected(prompt, 16), "the base is another one"
