"""/v1/completions with the official client."""

from __future__ import annotations

from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL, Serve, served_by

PROMPT = "Hello"


async def test_prompts_and_choices_come_in_order(serve: Serve) -> None:
    async with serve() as served:

        async def ask(prompt: object, n: int, seed: int = 7) -> list[str]:
            answer = await served.client.completions.create(
                model=MODEL,
                prompt=prompt,  # type: ignore[arg-type]
                n=n,
                max_tokens=8,
                seed=seed,
                extra_body={"ignore_eos": True},
            )
            assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
            return [choice.text for choice in answer.choices]

        one, other = await ask("one", 3), await ask("other", 3)
        assert len({*one, *other}) == 6
        assert await ask(["one", "other"], 3) == [*one, *other]
        assert (await ask("one", 1)) == one[:1]
        assert await ask([list(b"one"), list(b"other")], 1) != one  # ids are the vocabulary's, not bytes
        assert await ask("one", 3, seed=8) != one


async def test_a_streamed_choice_does_not_wait_for_the_others(serve: Serve) -> None:
    async with serve() as served:
        stream = await served.client.completions.create(
            model=MODEL,
            prompt=PROMPT,
            n=3,
            seed=1,
            max_tokens=8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        order: list[int] = []
        texts = ["", "", ""]
        async for chunk in stream:
            for choice in chunk.choices:
                order.append(choice.index)
                texts[choice.index] += choice.text
        assert order != sorted(order)
        whole = await served.client.completions.create(
            model=MODEL, prompt=PROMPT, n=3, seed=1, max_tokens=8, extra_body={"ignore_eos": True}
        )
        assert texts == [choice.text for choice in whole.choices]


async def test_a_model_without_a_tokenizer_takes_token_ids(tiny: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny) as engine, served_by(engine) as served:
        for stream in (False, True):
            body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 1, "stream": stream}
            answer = await served.http.post("/v1/completions", json=body)
            assert answer.status_code == 200
        answer = await served.http.post("/v1/completions", json={"model": MODEL, "prompt": "text"})
        assert answer.status_code == 400
        messages = [{"role": "user", "content": "Hi"}]
        chat = await served.http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
        assert chat.status_code == 400
        assert "tokenizer" in chat.json()["error"]["message"]
