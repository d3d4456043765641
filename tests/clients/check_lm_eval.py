"""lm-eval: log-likelihoods as transformers and peft have them, and a task from beginning to end.

``AIOENGINE_REFERENCE`` is the file that ``reference.py`` has written.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from harness import ADAPTER, BASE_URL, MODEL, check, main
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

REFERENCE = json.loads(Path(os.environ["AIOENGINE_REFERENCE"]).read_text())


def scorer(model: str, **options: Any) -> LocalCompletionsAPI:
    return LocalCompletionsAPI(
        model=model, base_url=f"{BASE_URL}/completions", max_retries=1, max_length=500, **options
    )


def asked(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, tuple(each), index) for index, each in enumerate(arguments)]


def compare(model: str, lm: LocalCompletionsAPI) -> None:
    expected = REFERENCE["expected"][model]
    found = lm.loglikelihood(asked("loglikelihood", REFERENCE["asked"]["pairs"]), disable_tqdm=True)
    for (value, greedy), (wanted, is_greedy) in zip(found, expected["pairs"], strict=True):
        assert abs(value - wanted) < 1e-3 and greedy == is_greedy, (found, expected["pairs"])


@check("lm_eval", "loglikelihood equals transformers' and peft's")
def loglikelihood() -> None:
    for model in (MODEL, ADAPTER):
        for options in ({"batch_size": 1}, {"batch_size": 3}, {"num_concurrent": 4}):
            compare(model, scorer(model, tokenizer_backend="auto", tokenized_requests=True, **options))


@check("lm_eval", "loglikelihood_rolling equals transformers' and peft's")
def rolling() -> None:
    for model in (MODEL, ADAPTER):
        lm = scorer(model, tokenizer_backend="auto", tokenized_requests=True)
        texts = [[text] for text in REFERENCE["asked"]["rolling"]]
        found = lm.loglikelihood_rolling(asked("loglikelihood_rolling", texts), disable_tqdm=True)
        for value, wanted in zip(found, REFERENCE["expected"][model]["rolling"], strict=True):
            assert abs(value - wanted) < 1e-3, (found, wanted)


@check("lm_eval", "requests as text")
def texts() -> None:
    compare(MODEL, scorer(MODEL, tokenizer_backend="remote", tokenized_requests=False))


@check("lm_eval", "a multiple-choice task, and one that generates")
def tasks() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "capitals.jsonl"
        capitals = (("France", "Paris"), ("Italy", "Rome"))
        rows = [
            {"q": f"The capital of {c} is", "good": a, "choices": [f" {a}", " of of"]} for c, a in capitals
        ]
        file.write_text("\n".join(map(json.dumps, rows)))
        common = {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "doc_to_text": "{{q}}",
        }
        choice = {
            "task": "capitals",
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": 0,
            "target_delimiter": "",
            **common,
        }
        said = {
            "task": "said",
            "output_type": "generate_until",
            "doc_to_target": "{{good}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 5},
            "metric_list": [{"metric": "exact_match"}],
            **common,
        }
        lm = scorer(MODEL, tokenizer_backend="auto", batch_size=4)
        results = lm_eval.simple_evaluate(model=lm, tasks=[choice, said], bootstrap_iters=0)
    assert results["results"]["capitals"]["acc,none"] == 1.0, results["results"]
    assert "said" in results["results"]


if __name__ == "__main__":
    main()
