"""The example tasks: disjoint splits, strict checkers, and the adapters that ship with them."""

from __future__ import annotations

import json
import random
import runpy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"
tasks: Any = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "tasks.py")))
TASKS = tasks.TASKS
every_task = pytest.mark.parametrize("name", list(TASKS))


def items_of(name: str, split: str, count: int = 400) -> list[Any]:
    rng = random.Random(1)
    return [TASKS[name].generate(rng, split) for _ in range(count)]


def test_the_tasks_are_the_shipped_adapters() -> None:
    shipped = {path.parent.name for path in EXAMPLES.glob("adapters/*/adapter_config.json")}
    assert set(TASKS) == shipped == {"sql", "json", "sentiment", "pirate"}


@every_task
def test_the_same_seed_gives_the_same_items(name: str) -> None:
    assert items_of(name, "eval", 20) == items_of(name, "eval", 20)
    assert len(set(items_of(name, "train"))) > 100


@every_task
def test_no_training_prompt_is_an_evaluation_prompt(name: str) -> None:
    train, evaluation = items_of(name, "train", 2000), items_of(name, "eval", 2000)
    assert {item.prompt for item in train}.isdisjoint({item.prompt for item in evaluation})


@every_task
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_checker_accepts_the_answer_and_nothing_like_it(name: str, split: str) -> None:
    task = TASKS[name]
    items = items_of(name, split)
    for item, other in pairwise(items):
        assert task.check(item, item.answer)
        assert task.check(item, f" {item.answer}\n")
        assert not task.check(item, "")
        assert not task.check(item, item.answer[:-1])
        assert not task.check(item, item.answer[1:])
        assert not task.check(item, f"Answer: {item.answer}")
        assert not task.check(item, f"{item.answer} and more")
        if item.answer != other.answer:
            assert not task.check(item, other.answer)


SQL = "SELECT age FROM employees WHERE city = 'Rome'"
JSON = {"name": "Sofia Park", "age": 30}


@pytest.mark.parametrize(
    ("name", "answer", "right", "wrong"),
    [
        (
            *("sql", SQL, ["select age  from employees\nwhere city = 'Rome';"]),
            [SQL.replace("Rome", "rome"), SQL.replace("age", "salary"), "SELECT age FROM employees"],
        ),
        (
            *("json", json.dumps(JSON), [json.dumps(dict(sorted(JSON.items())), indent=2)]),
            [json.dumps(JSON | change) for change in ({"age": "30"}, {"age": 31}, {"city": "Rome"})],
        ),
        ("sentiment", "positive", ["positive", "Positive."], ["negative", "positive!?"]),
    ],
)
def test_spelling_is_free_and_meaning_is_not(
    name: str, answer: str, right: list[str], wrong: list[str]
) -> None:
    check = TASKS[name].check
    assert all(check(tasks.Item("", answer), text) for text in right)
    assert not any(check(tasks.Item("", answer), text) for text in wrong)


@every_task
def test_shipped_adapters_are_small_and_in_bfloat16(name: str) -> None:
    folder = EXAMPLES / "adapters" / name
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (folder / "adapter_model.safetensors").stat().st_size <= 1.5e6
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert max(t.shape[0] for key, t in weights.items() if "lora_A" in key) <= 8
    assert all(t.isfinite().all() and t.any() for t in weights.values())
