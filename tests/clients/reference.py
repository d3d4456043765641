"""What transformers and peft make of the log-likelihoods that ``check_lm_eval.py`` asks for, as JSON.

Run by the project's environment: ``python reference.py MODEL_FOLDER ADAPTER_FOLDER``.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " a banana, of course"),
    ("SELECT name FROM", " employees WHERE salary > 5"),
    ("Grüße aus", " München"),
]
ROLLING = ["The quick brown fox jumps over the lazy dog. " * 3, "SELECT * FROM orders;"]


def main() -> None:
    folder, adapter = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def score(prefix: list[int], ids: list[int]) -> tuple[float, bool]:
        with torch.no_grad():
            table = model(torch.tensor([prefix + ids])).logits[0].log_softmax(-1)
        rows = table[len(prefix) - 1 : -1]
        value = sum(row[token].item() for row, token in zip(rows, ids, strict=True))
        return value, rows.argmax(-1).tolist() == ids

    def all_scores() -> dict[str, object]:
        pairs = []
        for context, continuation in PAIRS:
            before = tokenizer.encode(context, add_special_tokens=False)
            whole = tokenizer.encode(context + continuation, add_special_tokens=False)
            pairs.append(score(before, whole[len(before) :]))
        begin = [tokenizer.bos_token_id]
        rolling = [score(begin, tokenizer.encode(text, add_special_tokens=False))[0] for text in ROLLING]
        return {"pairs": pairs, "rolling": rolling}

    found = {"smollm2-135m": all_scores()}
    model = PeftModel.from_pretrained(model, adapter)
    found["sql"] = all_scores()
    print(json.dumps({"asked": {"pairs": PAIRS, "rolling": ROLLING}, "expected": found}))


if __name__ == "__main__":
    main()
