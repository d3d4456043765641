"""Seeds of requests that have none: nobody can tell them, and the answer says which was used."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.server_fixtures import MODEL, Serve

from aioengine.cli.config.checked import FleetFlags, ServerFlags, check_all
from aioengine.cli.flags import EngineFlags

PROMPT = {"model": MODEL, "prompt": "Hello", "max_tokens": 8, "temperature": 1, "ignore_eos": True}
CHAT = {"model": MODEL, "max_tokens": 8, "messages": [{"role": "user", "content": "Hello"}]}


async def drawn(serve: Serve, **fields: Any) -> list[tuple[int, str]]:
    async with serve(**fields) as served:
        answers = [(await served.http.post("/v1/completions", json=PROMPT)).json() for _ in range(4)]
    return [(answer["seed"], answer["choices"][0]["text"]) for answer in answers]


async def test_every_server_draws_its_own(serve: Serve) -> None:
    first, second = await drawn(serve), await drawn(serve)
    assert len({seed for seed, _ in first + second}) == 8
    assert {text for _, text in first}.isdisjoint(text for _, text in second)


async def test_a_server_with_a_seed_draws_the_same_again(serve: Serve) -> None:
    first = await drawn(serve, seed=5)
    assert first == await drawn(serve, settings={"seed": 5}) != await drawn(serve, settings={"seed": 0})
    assert await drawn(serve, settings={"seed": 0}) == await drawn(serve, settings={"seed": 0})


@pytest.mark.parametrize("choices", [1, 3])
async def test_the_seed_of_an_answer_gives_the_answer_again(choices: int, serve: Serve) -> None:
    async with serve() as served:
        asked = {**PROMPT, "n": choices}
        first = (await served.http.post("/v1/completions", json=asked)).json()
        again = (await served.http.post("/v1/completions", json={**asked, "seed": first["seed"]})).json()
        assert again["choices"] == first["choices"] and again["seed"] == first["seed"]


async def test_answers_of_every_api_have_it(serve: Serve) -> None:
    async with serve() as served:
        for path, body in (
            ("/v1/completions", PROMPT),
            ("/v1/chat/completions", CHAT),
            ("/v1/responses", {"model": MODEL, "input": "Hello", "max_output_tokens": 16}),
            ("/v1/messages", CHAT),
        ):
            for seed in (None, 3):
                chosen = {} if seed is None or path in ("/v1/responses", "/v1/messages") else {"seed": seed}
                answer = (await served.http.post(path, json={**body, **chosen})).json()
                assert isinstance(answer["seed"], int) and answer["seed"] == chosen.get(
                    "seed", answer["seed"]
                )
                streamed = await served.http.post(path, json={**body, **chosen, "stream": True})
                [first, *_] = [line for line in streamed.text.splitlines() if line.startswith("data: {")]
                event = json.loads(first.removeprefix("data: "))
                assert isinstance((event.get("response") or event.get("message") or event)["seed"], int)


def test_the_command_draws_unless_a_seed_is_given() -> None:
    def seed(**flags: Any) -> int | None:
        return check_all(ServerFlags(), EngineFlags(**flags), FleetFlags()).settings.seed

    assert seed() is None and seed(seed=0) == 0 and seed(seed=7) == 7
