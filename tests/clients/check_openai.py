"""OpenAI's own client."""

from __future__ import annotations

import json

import openai
from harness import ADAPTER, BASE_URL, KEY, MODEL, USER, WEATHER, check, main

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)


@check("openai", "models")
def models() -> None:
    assert {MODEL, ADAPTER} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(ADAPTER).id == ADAPTER


@check("openai", "chat, whole and streamed")
def chat() -> None:
    for model in (MODEL, ADAPTER):
        answer = client.chat.completions.create(model=model, messages=USER, max_tokens=8, temperature=0)
        stream = client.chat.completions.create(
            model=model,
            messages=USER,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == answer.choices[0].message.content and text
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


@check("openai", "log-probabilities of a chat")
def logprobs() -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None and len(found.content) == 4
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in found.content)


@check("openai", "completions with echo and log-probabilities")
def echo() -> None:
    for max_tokens in (0, 1):
        answer = client.completions.create(
            model=MODEL,
            prompt=["The capital of France", "One two"],
            echo=True,
            logprobs=1,
            max_tokens=max_tokens,
        )
        for choice, text in zip(answer.choices, ("The capital of France", "One two"), strict=True):
            assert choice.text.startswith(text) and choice.logprobs is not None
            tokens, values = choice.logprobs.tokens, choice.logprobs.token_logprobs
            assert tokens and values and values[0] is None and all(value <= 0 for value in values[1:])
            assert "".join(tokens) == choice.text


@check("openai", "several choices, with a seed")
def choices() -> None:
    def draw() -> list[str | None]:
        answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=8, n=3, seed=7)
        return [choice.message.content for choice in answer.choices]

    assert draw() == draw() and len(set(draw())) > 1


@check("openai", "tools: required, named, one at a time, allowed")
def tools() -> None:
    choices: list[dict[str, object]] = [
        {"tool_choice": "required"},
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}],
                },
            }
        },
    ]
    for choice in choices:
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, tools=[WEATHER], max_tokens=60, temperature=0, **choice
        )
        [call] = answer.choices[0].message.tool_calls or []
        assert call.function.name == "get_weather" and set(json.loads(call.function.arguments)) == {"city"}
    history = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    assert (
        client.chat.completions.create(model=MODEL, messages=history, max_tokens=5).choices[0].finish_reason
    )


@check("openai", "a function without parameters")
def no_parameters() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        answer = client.chat.completions.create(
            model=MODEL, messages=USER, tools=[tool], tool_choice=choice, max_tokens=40, temperature=0
        )
        [call] = answer.choices[0].message.tool_calls or []
        assert json.loads(call.function.arguments) == {}


@check("openai", "fields of vLLM in extra_body")
def extra_body() -> None:
    fields = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 4, "return_token_ids": True,
        "include_stop_str_in_output": True, "structured_outputs": {"regex": "[a-z]{8,9}"},
        "request_id": "mine", "cache_salt": "x", "priority": 1,
    }  # fmt: skip
    answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=20, extra_body=fields)
    assert answer.id.endswith("mine") and answer.usage is not None
    text = answer.choices[0].message.content
    assert text is not None and text.isalpha() and 8 <= len(text) <= 9
    again = [*USER, {"role": "assistant", "content": "The weather is"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat.completions.create(model=MODEL, messages=again, max_tokens=5, extra_body=fields)
    assert answer.choices[0].message.content
    answer = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=4, reasoning_effort="none", verbosity="low"
    )
    assert answer.choices[0].finish_reason


@check("openai", "responses: create, stream")
def responses() -> None:
    answer = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=16, temperature=0)
    assert answer.output_text and answer.usage is not None
    events = list(
        client.responses.create(
            model=MODEL, input="Say hello.", max_output_tokens=16, temperature=0, stream=True
        )
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer.output_text and events[0].type == "response.created"


@check("openai", "errors by type")
def errors() -> None:
    wrong = (
        (openai.NotFoundError, {"model": "nobody"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"extra_body": {"max_token": 1}}),
        (openai.NotFoundError, None),
    )
    for kind, fields in wrong:
        try:
            if fields is None:
                client.moderations.create(input="x")
            else:
                client.chat.completions.create(
                    **{"model": MODEL, "messages": USER, "max_tokens": 1, **fields}
                )
        except kind:
            continue
        raise AssertionError(f"{fields}: not refused")


if __name__ == "__main__":
    main()
