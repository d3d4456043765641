"""OpenAI's own client: what it is asked most, and vLLM's fields (`tests/server` asks for the rest)."""

from __future__ import annotations

import openai
from harness import ADAPTER, BASE_URL, KEY, MODEL, USER, check, main

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


if __name__ == "__main__":
    main()
