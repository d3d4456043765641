"""The demo's prompts: exercises for the example adapters, and questions for the base model."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import aioengine
from aioengine.errors import ConfigError

ADAPTERS = ("sql", "json", "sentiment", "pirate")

_ORDER = (
    *(None, "sql", "json", "sql", None, "sentiment"),
    *("json", "pirate", None, "sentiment", "pirate", None),
)
"""Adapters in the order of the requests: more at a time than slots, and some more than once."""

_QUESTIONS = (
    "What is the capital of France?",
    "Name the three primary colours.",
    "Why is the sky blue? Answer in one sentence.",
    "Write two lines about the sea.",
)


class Job(NamedTuple):
    """One prompt of the demo."""

    id: str
    adapter: str | None
    """None is the base model."""
    question: str
    messages: list[dict[str, Any]]
    check: Callable[[str], bool] | None
    """Checks whether an answer is right; None where no program can tell."""


def default_folder() -> Path:
    """Return ``examples/adapters`` of the source checkout that this package belongs to."""
    return Path(aioengine.__file__).resolve().parent.parent / "examples" / "adapters"


def make_jobs(folder: Path, count: int, seed: int) -> list[Job]:
    """Make ``count`` jobs; the same seed gives the same jobs.

    Raises ConfigError if the adapters, or the tasks that they were trained on, are missing.
    """
    for name in ADAPTERS:
        if not (folder / name / "adapter_config.json").is_file():
            raise ConfigError(
                f"the demo's adapter {name!r} is not in {folder}: run the demo from a source "
                "checkout of aioengine, or give the folder with --adapters"
            )
    tasks = _load_tasks(folder.parent / "tasks.py").TASKS
    rng = random.Random(seed)
    jobs: list[Job] = []
    for index in range(count):
        adapter = _ORDER[index % len(_ORDER)]
        number = 1 + sum(job.adapter == adapter for job in jobs)
        job_id = f"{adapter or 'base'}-{number}"
        if adapter is None:
            question = _QUESTIONS[(number - 1) % len(_QUESTIONS)]
            messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
            jobs.append(Job(job_id, None, question, messages, None))
        else:
            task = tasks[adapter]
            item = task.generate(rng, "eval")
            check = _checker(task.check, item)
            jobs.append(Job(job_id, adapter, item.prompt, task.messages(item), check))
    return jobs


def _checker(check: Callable[[Any, str], bool], item: Any) -> Callable[[str], bool]:
    return lambda text: check(item, text)


def _load_tasks(path: Path) -> ModuleType:
    """Import ``examples/tasks.py`` by its path: the examples are not part of the package."""
    name = "_aioengine_example_tasks"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"the demo's tasks are not at {path}: put them beside the adapters")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
