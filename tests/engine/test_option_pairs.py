"""Options that change the memory, or who computes: each pair works, with the tokens that it must have, or is
refused. The table in docs/configuration.md says which."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of, register
from support.selection import mostly_slow

from aioengine.errors import ConfigError

pytestmark = pytest.mark.usefixtures("preloaded_workers")

OPTIONS: dict[str, dict[str, Any]] = {
    "int8 weights": {"quantization": "int8"},
    "int4 weights": {"quantization": "int4"},
    "fp8 weights": {"quantization": "fp8"},
    "int8 KV cache": {"kv_cache_dtype": "int8"},
    "int8 adapters": {"lora_dtype": "int8"},
    "slots by bytes": {"slot_memory": "200KiB"},
    "transformers": {"model_impl": "transformers"},
    "speculation": {"speculation": "ngram"},
    "process": {"executor": "process"},
    "two ranks": {"executor": "process", "tensor_parallel_size": 2},
    "fully sharded": {"executor": "process", "tensor_parallel_size": 2, "fully_sharded_loras": True},
}
NUMERIC = ("int8 weights", "int4 weights", "fp8 weights", "int8 KV cache", "int8 adapters", "transformers")
"""Options that may change tokens. The others must not: an engine with these alone is the reference."""
ROUNDED = ("int8 weights", "int4 weights", "int8 adapters")
"""Options of which each rank rounds its own share."""

WORK = [
    ("int8 weights", "int8 KV cache", "int8 adapters", "slots by bytes", "speculation", "process"),
    ("int4 weights", "int8 KV cache", "int8 adapters", "slots by bytes", "speculation", "process"),
    ("fp8 weights", "int8 KV cache", "int8 adapters", "slots by bytes", "speculation", "process"),
    ("int8 weights", "slots by bytes"),
    ("int4 weights", "slots by bytes"),
    ("int8 weights", "int8 KV cache", "int8 adapters", "slots by bytes", "speculation", "two ranks"),
    ("int8 weights", "int8 KV cache", "slots by bytes", "speculation", "fully sharded"),
    ("int4 weights", "slots by bytes", "fully sharded"),
    ("int4 weights", "int8 KV cache", "int8 adapters", "slots by bytes", "two ranks"),
    ("fp8 weights", "slots by bytes", "two ranks"),
    ("fp8 weights", "fully sharded"),
    ("int8 adapters", "slots by bytes", "transformers", "process"),
]
"""Combinations that work: so does each pair in one of them."""
REFUSED = [
    ("int8 adapters", "fully sharded"),
    *((name, "transformers") for name in ("int8 weights", "int4 weights", "fp8 weights", "int8 KV cache")),
    *((name, "transformers") for name in ("speculation", "two ranks", "fully sharded")),
]
"""Pairs of which ConfigError says what to do."""


def together(names: Iterable[str]) -> dict[str, Any]:
    return {key: value for name in names for key, value in OPTIONS[name].items()}


def excludes(a: str, b: str) -> bool:
    """Whether they are two values of one setting."""
    return any(OPTIONS[a][key] != OPTIONS[b].get(key, OPTIONS[a][key]) for key in OPTIONS[a]) or (
        "executor" in OPTIONS[a] and "executor" in OPTIONS[b]
    )


async def tokens_of(tiny: Tiny, make_engine: MakeEngine, options: dict[str, Any]) -> list[list[int]]:
    """Tokens of a dozen requests at once, for more adapters than fit."""
    small = {
        "max_loras": 3,
        "max_cpu_loras": 6,
        "block_size": 16,
        "max_model_len": 48,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 48,
        "kv_cache_memory": "300KiB",
    }
    names = ["all-modules", "rank-3", "qv-only", "patterns", "regex"]
    async with make_engine(tiny, **{**small, **options}) as engine:
        register(engine, tiny, *names)
        asked = [
            engine.complete(prompt_of(i % 4, 18), greedy(8), adapter=[None, *names][i % 6]) for i in range(12)
        ]
        outputs = await asyncio.gather(*asked)
        engine.check_invariants()
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], list[list[int]]]:
    return {}


@pytest.mark.parametrize("names", mostly_slow(WORK, WORK[0], WORK[3], WORK[5]), ids=", ".join)
@pytest.mark.slow
async def test_tokens_do_not_depend_on_memory_speculation_or_processes(
    tiny: Tiny,
    make_engine: MakeEngine,
    names: tuple[str, ...],
    references: dict[tuple[str, ...], list[list[int]]],
) -> None:
    numeric = tuple(name for name in names if name in NUMERIC)
    if {"two ranks", "fully sharded"} & set(names) and set(ROUNDED) & set(names):
        numeric += ("two ranks",)  # each rank's share has scales of its own
    if numeric not in references:
        references[numeric] = await tokens_of(tiny, make_engine, together(numeric))
    assert await tokens_of(tiny, make_engine, together(names)) == references[numeric]


@pytest.mark.parametrize("pair", REFUSED, ids=" with ".join)
async def test_what_does_not_work_together_is_refused(
    tiny: Tiny, make_engine: MakeEngine, pair: tuple[str, str]
) -> None:
    with pytest.raises(ConfigError, match=r"(?s)set \w+=|set \w+ "):
        async with make_engine(tiny, **{"block_size": 16, "max_model_len": 48, **together(pair)}):
            pass


def test_every_pair_is_in_the_table_of_the_docs() -> None:
    names = list(OPTIONS)
    rows = [f"| | {' | '.join(names[1:])} |", "|---" * len(names) + "|"]
    for row, a in enumerate(names[:-1]):
        cells = [""] * row
        for b in names[row + 1 :]:
            works = any({a, b} <= set(combination) for combination in WORK)
            refused = (a, b) in REFUSED or (b, a) in REFUSED
            assert works + refused + excludes(a, b) == 1, (a, b)
            cells.append("yes" if works else "refused" if refused else "–")
        rows.append(f"| {a} | {' | '.join(cells)} |")
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert "\n".join(rows) in page.read_text(), "the table is:\n" + "\n".join(rows)
