"""The example of reinforcement learning, without trl: what its trainer would ask and get."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from support.tiny_models import build_model, reference_logits

from aioengine import EngineConfig, LoRAConfig

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo.py"


@pytest.fixture(scope="module")
def example() -> Any:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLE)))


def test_the_reward_is_for_the_first_word(example: Any) -> None:
    said = [{"role": "assistant", "content": " The sea"}]
    assert example.begins_with_the(["The end", "", "Then", "In The", said], prompts=[]) == [1, 0, 0, 0, 1]


@pytest.mark.slow
def test_completions_are_the_present_adapters(example: Any, tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model", "llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    tokenizer = SimpleNamespace(apply_chat_template=lambda prompt, **_: list(prompt))
    accelerator = SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    trainer = SimpleNamespace(
        model=model, processing_class=tokenizer, accelerator=accelerator, temperature=1.0
    )
    config = EngineConfig(
        model=str(folder), dtype="float32", max_model_len=64, kv_cache_memory="1MiB", lora=LoRAConfig()
    )
    asked = [[5, 6, 7], [5, 6, 7], [9, 10]]
    with example.Rollouts(config, max_tokens=6) as rollouts:
        first = rollouts(asked, trainer)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        second = rollouts(asked, trainer)
    assert first["prompt_ids"] == second["prompt_ids"] == asked
    assert first["completion_ids"][0] != first["completion_ids"][1], "each has a seed of its own"
    model.save_pretrained(str(tmp_path / "adapter"))
    for adapter, found in ((None, first), (tmp_path / "adapter", second)):
        for prompt, tokens, logprobs in zip(asked, found["completion_ids"], found["logprobs"], strict=True):
            table = reference_logits(folder, prompt + tokens, adapter).log_softmax(-1)[len(prompt) - 1 :]
            theirs = [table[at, token].item() for at, token in enumerate(tokens)]
            assert 1 <= len(tokens) <= 6 and logprobs == pytest.approx(theirs, abs=1e-4)
