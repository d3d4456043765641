"""Fewer steps for the same tokens: speculation, tokens that a grammar forces, activated LoRA."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aioengine import AsyncEngine, LoRAConfig, SamplingParams
from aioengine.cli.bench import random_prompts
from aioengine.events import Event, TokensProposed
from aioengine.guided import Guide
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.request import StartedConstraint
from benchmarks.runner import Calls
from benchmarks.shared.engines import configuration, spec_of, started
from benchmarks.shared.texts import paragraphs

OUTPUT = 96
NAMES = ("Ada", "Boris", "Chiara", "Dmitri", "Elif", "Femi", "Greta", "Hiro", "Ines", "Jonas")
CITIES = ("Lisbon", "Osaka", "Tromso", "Quito", "Dakar", "Bergen", "Pune", "Leeds", "Gdansk", "Cork")


def record(rng: random.Random) -> str:
    """Write a prompt that asks for the fields of texts as JSON, after two examples."""

    def pair() -> tuple[str, str]:
        name, city, mail = rng.choice(NAMES), rng.choice(CITIES), f"user{rng.randrange(10**6)}@example.org"
        order = f"{rng.choice('ABCDEF')}{rng.randrange(10**7)}-{rng.randrange(100)}"
        text = f"{name} from {city} (mail {mail}) asks about order {order}, sent to {city}."
        return text, f'{{"name": "{name}", "city": "{city}", "mail": "{mail}", "order": "{order}"}}'

    prompt = ""
    for _ in range(2):
        texts, answers = zip(*(pair() for _ in range(3)), strict=True)
        prompt += f"Text: {' '.join(texts)}\nJSON: [{', '.join(answers)}]\n\n"
    return f"{prompt}Text: {' '.join(pair()[0] for _ in range(3))}\nJSON: [{{"


def quote(rng: random.Random) -> str:
    """Write a prompt that asks for a quotation, after two examples."""
    *examples, last = rng.sample([text for text in paragraphs() if 200 < len(text) < 600], 3)
    answered = (f'User: {text}\nAssistant: You wrote: "{text}" Yes, that is right.\n\n' for text in examples)
    return f'{"".join(answered)}User: {last}\nAssistant: You wrote: "'


TASKS: dict[str, tuple[Callable[[random.Random], Any], float]] = {
    "fields as JSON": (record, 0.0),
    "a quotation": (quote, 0.0),
    "random text": (lambda rng: random_prompts(40_100, 1, 128, rng)[0], 1.0),
}
"""Function that makes a prompt, and the temperature."""


async def speculation(
    *, model: str = "smollm2-135m", requests: tuple[int, ...] = (1, 8), rounds: int = 5
) -> AsyncGenerator[Calls, None]:
    """Speculation on tasks that copy, and on random text, where it can only cost."""
    configs = {
        mode: configuration(
            model, speculation=mode, max_model_len=1024,
            max_num_seqs=max(requests), enable_prefix_caching=True,
        )
        for mode in ("none", "ngram")
    }  # fmt: skip
    async with started(configs) as engines:
        for task, (make, temperature) in TASKS.items():
            for count in requests:

                async def decode(
                    engine: AsyncEngine, rng: random.Random, make: Any = make, count: int = count,
                    temperature: float = temperature,
                ) -> dict[str, float]:  # fmt: skip
                    return await _decode(engine, [make(rng) for _ in range(count)], temperature)

                # Each round has other prompts, the same for both modes.
                calls = {
                    mode: partial(decode, engine, random.Random(f"{task} {count}"))
                    for mode, engine in engines.items()
                }
                yield Calls(f"{task}, {count} requests, {OUTPUT} output tokens", calls, rounds)


async def _decode(engine: AsyncEngine, prompts: Sequence[Any], temperature: float) -> dict[str, float]:
    """Return the output tokens a second after the first, and how many proposed tokens were right."""
    proposed = accepted = 0

    def listen(event: Event) -> None:
        nonlocal proposed, accepted
        if isinstance(event, TokensProposed):
            proposed, accepted = proposed + event.proposed, accepted + event.accepted

    remove = engine.add_listener(listen)
    kinds = [
        SamplingParams(max_tokens=OUTPUT, ignore_eos=True, temperature=temperature, seed=i)
        for i in range(len(prompts))
    ]
    outputs = await asyncio.gather(*map(engine.complete, prompts, kinds))
    remove()
    begin, end = max(out.first_token or 0.0 for out in outputs), max(out.last_token or 0.0 for out in outputs)
    rate = len(prompts) * (OUTPUT - 1) / (end - begin)
    return {"output tok/s": rate, "proposed": proposed, "right, %": 100 * accepted / max(proposed, 1)}


SCHEMA = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "shipping_city": {"enum": ["Lisbon", "Osaka", "Tromso", "Quito"]},
        "order_number": {"type": "string", "pattern": "^[A-F][0-9]{5}$"},
        "number_of_items": {"type": "integer", "minimum": 1, "maximum": 99},
        "is_urgent": {"type": "boolean"},
    },
    "required": ["customer_name", "shipping_city", "order_number", "number_of_items", "is_urgent"],
    "additionalProperties": False,
}


class Unforced:
    """The same constraint, asked for every token."""

    def __init__(self, inner: StartedConstraint) -> None:
        self._inner = inner
        self.begin, self.poll, self.allowed = inner.begin, inner.poll, inner.allowed

    @property
    def slow(self) -> bool:
        return self._inner.slow


async def forced(
    *, model: str = "smollm2-135m", requests: tuple[int, ...] = (1, 8), rounds: int = 5
) -> AsyncGenerator[Calls, None]:
    """Taking the tokens that a grammar forces without a step for each: an order as JSON by a schema."""
    config = configuration(model, max_model_len=512, max_num_seqs=max(requests))
    async with AsyncEngine(config) as engine:
        guide = Guide(engine)

        async def orders(count: int, unforced: bool) -> dict[str, float]:
            async def one(i: int) -> Any:
                constraint: Any = await guide.json_schema(SCHEMA)
                params = SamplingParams(
                    max_tokens=120, temperature=0.7, seed=i,
                    constraint=Unforced(constraint) if unforced else constraint,
                )  # fmt: skip
                return await engine.complete(f"{i}. Order {1000 + i} of {NAMES[i % 10]} as JSON: ", params)

            began, steps = time.perf_counter(), engine.stats().steps
            outputs = await asyncio.gather(*map(one, range(count)))
            tokens = sum(len(out.token_ids) for out in outputs)
            return {
                "output tok/s": tokens / (time.perf_counter() - began),
                "steps": engine.stats().steps - steps,
                "tokens": tokens,
            }

        for count in requests:
            calls = {
                "a step for each token": partial(orders, count, True),
                "with forced tokens": partial(orders, count, False),
            }
            yield Calls(f"{count} orders as JSON by a schema", calls, rounds)


async def activated(
    *, model: str = "smollm2-135m", tokens: int = 4096, rounds: int = 5
) -> AsyncGenerator[Calls, None]:
    """Time to first token of an adapter that is asked about a conversation: activated LoRA and plain LoRA.

    The base model computes a conversation. The activated adapter then finds it in the prefix cache, and the
    plain one has to compute it again.
    """
    invocation = [1000, 2000, 3000]
    config = configuration(
        model,
        max_model_len=tokens + 64,
        enable_prefix_caching=True,
        lora=LoRAConfig(max_loras=3, max_lora_rank=16),
    )
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncEngine(config) as engine:
            for seed, name in enumerate(("plain", "activated")):
                path = write_random_adapter(Path(folder) / name, spec_of(model), 16, seed=seed)
                if name == "activated":
                    file = path / "adapter_config.json"
                    more = {"alora_invocation_tokens": invocation}
                    file.write_text(json.dumps(json.loads(file.read_text()) | more))
                await engine.load_adapter(name, path, pin=True)
            params = SamplingParams(max_tokens=2, ignore_eos=True)

            async def ask(adapter: str | None) -> dict[str, float]:
                chat = rng.choices(range(100, 900), k=tokens)
                await engine.complete(chat, params)
                out = await engine.complete(
                    [*chat, *(invocation if adapter else [50])], params, adapter=adapter
                )
                return {
                    "first token, ms": 1e3 * (out.ttft or 0.0),
                    "tokens from the cache": out.cached_tokens,
                }

            calls = {name or "base again": partial(ask, name) for name in ("plain", "activated", None)}
            yield Calls(f"After a conversation of {tokens} tokens", calls, rounds)


CASES = (speculation, forced, activated)
