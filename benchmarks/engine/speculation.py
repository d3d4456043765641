"""Gain of speculation on tasks that copy, and its cost on text that does not repeat itself.

    python -m benchmarks.engine.speculation
    python -m benchmarks.engine.speculation --requests 1 8 32 --quantization int8

Tasks that copy: fields of a record as JSON, a paragraph without its last sentence, and an answer that quotes
a message; each after two examples, with paragraphs of this repository's documentation. Text that does not
repeat itself: random prompts, sampled at temperature 1. Each round has new prompts, the same for every mode,
and the modes take turns. Prints medians and the share of proposed tokens that were right, and a warning if
two modes generated different tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from aioengine import AsyncEngine, EngineConfig, SamplingParams
from aioengine.events import Event, TokensProposed
from benchmarks.shared.engines import random_prompts, started
from benchmarks.shared.report import arguments, console, new_table

MODES = ("none", "ngram")
OUTPUT = 96
NAMES = ("Ada", "Boris", "Chiara", "Dmitri", "Elif", "Femi", "Greta", "Hiro", "Ines", "Jonas")
CITIES = ("Lisbon", "Osaka", "Tromso", "Quito", "Dakar", "Bergen", "Pune", "Leeds", "Gdansk", "Cork")


def paragraphs() -> list[str]:
    """Return paragraphs of the documentation with two sentences or more."""
    found = []
    for file in sorted((Path(__file__).parents[2] / "docs").glob("*.md")):
        for text in file.read_text(encoding="utf-8").split("\n\n"):
            if text[:1].isalpha() and 200 < len(text) < 600 and text.count(". ") >= 2:
                found.append(" ".join(text.split()))
    return found


def record(rng: random.Random) -> str:
    def one() -> tuple[str, str]:
        name, city, mail = rng.choice(NAMES), rng.choice(CITIES), f"user{rng.randrange(10**6)}@example.org"
        order = f"{rng.choice('ABCDEF')}{rng.randrange(10**7)}-{rng.randrange(100)}"
        text = f"{name} from {city} (mail {mail}) asks about order {order}, sent to {city}."
        return text, f'{{"name": "{name}", "city": "{city}", "mail": "{mail}", "order": "{order}"}}'

    def several() -> str:
        pairs = [one() for _ in range(3)]
        texts, answers = zip(*pairs, strict=True)
        return "Text: " + " ".join(texts) + "\nJSON: [" + ", ".join(answers) + "]\n\n"

    last = " ".join(one()[0] for _ in range(3))
    return several() + several() + f"Text: {last}\nJSON: [{{"


def edit(rng: random.Random) -> str:
    texts = rng.sample(paragraphs(), 3)

    def shot(text: str) -> str:
        return f"Original: {text}\nWithout its last sentence: {text.rsplit('. ', 1)[0]}.\n\n"

    return shot(texts[0]) + shot(texts[1]) + f"Original: {texts[2]}\nWithout its last sentence:"


def quote(rng: random.Random) -> str:
    texts = rng.sample(paragraphs(), 3)

    def shot(text: str) -> str:
        return f'User: {text}\nAssistant: You wrote: "{text}" Yes, that is right.\n\n'

    return shot(texts[0]) + shot(texts[1]) + f'User: {texts[2]}\nAssistant: You wrote: "'


def noise(rng: random.Random) -> list[int]:
    return random_prompts(40_100, 1, 128, rng)[0]


TASKS: dict[str, tuple[Callable[[random.Random], Any], float]] = {
    "fields as JSON": (record, 0.0),
    "an edited text": (edit, 0.0),
    "a quotation": (quote, 0.0),
    "random text": (noise, 1.0),
}
"""Function that makes a prompt, and the temperature."""


class Mode:
    """An engine, and the number of tokens that were proposed in it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.proposed = self.accepted = 0
        engine.add_listener(self._listen)

    def _listen(self, event: Event) -> None:
        if isinstance(event, TokensProposed):
            self.proposed += event.proposed
            self.accepted += event.accepted

    async def run(self, prompts: Sequence[Any], temperature: float) -> tuple[float, list[list[int]]]:
        """Return (output tokens per second after the first, the tokens)."""
        kinds = [
            SamplingParams(max_tokens=OUTPUT, ignore_eos=True, temperature=temperature, seed=i)
            for i in range(len(prompts))
        ]
        runs = [self.engine.complete(p, params) for p, params in zip(prompts, kinds, strict=True)]
        outputs = await asyncio.gather(*runs)
        begin = max(out.first_token or 0.0 for out in outputs)
        end = max(out.last_token or 0.0 for out in outputs)
        return len(prompts) * (OUTPUT - 1) / (end - begin), [out.token_ids for out in outputs]


async def measure(args: argparse.Namespace, requests: int, table: Table) -> None:
    configs = {
        name: EngineConfig(
            model=args.model,
            quantization=args.quantization,
            speculation=name,
            max_model_len=1024,
            max_num_seqs=max(args.requests),
            kv_cache_memory="1GiB",
            lora=None,
            device="cpu",
        )
        for name in MODES
    }
    async with started(configs) as engines:
        modes = {name: Mode(engine) for name, engine in engines.items()}
        for task, (make, temperature) in TASKS.items():
            rates: dict[str, list[float]] = {name: [] for name in MODES}
            for mode in modes.values():
                mode.proposed = mode.accepted = 0
            same = True
            for round_ in range(args.repeats):
                rng = random.Random(f"{task} {requests} {round_}")
                prompts = [make(rng) for _ in range(requests)]
                outputs = []
                for name in random.Random(round_).sample(MODES, len(MODES)):
                    rate, tokens = await modes[name].run(prompts, temperature)
                    rates[name].append(rate)
                    outputs.append(tokens)
                same = same and all(tokens == outputs[0] for tokens in outputs)
            base = statistics.median(rates["none"])
            cells = [f"{base:.0f}"]
            for name in MODES[1:]:
                ratio = statistics.median(b / a for a, b in zip(rates["none"], rates[name], strict=True))
                mode = modes[name]
                right = mode.accepted / mode.proposed if mode.proposed else 0.0
                cells += [f"{ratio:.2f}x", f"{right:.0%} of {mode.proposed}"]
            table.add_row(task, str(requests), *cells, "yes" if same else "NO")


async def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    title = f"decoding, {args.quantization}, {OUTPUT} output tokens, medians of {args.repeats}"
    columns = ("requests", "tok/s", "ngram", "right", "same tokens")
    table = new_table(title, "task", *columns)
    for requests in args.requests:
        began = time.perf_counter()
        await measure(args, requests, table)
        print(f"{requests} requests: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
