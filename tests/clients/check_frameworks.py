"""Frameworks: each in the way that its documentation shows first."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from harness import BASE_URL, KEY, MODEL, USER, WEATHER, check, main
from pydantic import BaseModel

QUESTION = "What is the weather in Paris?"
SMALL: dict[str, Any] = {"max_tokens": 100, "temperature": 0}


class City(BaseModel):
    """A city"""

    name: str
    is_capital: bool


# litellm


@check("litellm", "chat, stream, text, tools, pydantic, Anthropic's bridge, errors")
def litellm_all() -> None:
    import litellm

    route: dict[str, Any] = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE_URL, "api_key": KEY, **SMALL}
    assert litellm.completion(messages=USER, **route).choices[0].message.content
    assert list(litellm.completion(messages=USER, stream=True, **route))
    called = litellm.completion(messages=USER, tools=[WEATHER], tool_choice="required", **route)
    assert called.choices[0].message.tool_calls[0].function.name == "get_weather"
    made = litellm.completion(messages=USER, response_format=City, **route)
    City.model_validate_json(made.choices[0].message.content)
    with contextlib.suppress(litellm.NotFoundError):
        litellm.completion(messages=USER, **{**route, "model": "hosted_vllm/nobody"})
    text = {**route, "model": f"text-completion-openai/{MODEL}"}
    assert litellm.text_completion(prompt="Hello", **text).choices[0].text
    bridged = asyncio.run(litellm.anthropic.messages.acreate(messages=USER, **route))
    assert bridged["content"]


# langchain


def chat_openai(**options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, **SMALL, **options)


@check("langchain-openai", "invoke, stream, batch")
def langchain_text() -> None:
    model = chat_openai(stream_usage=True)
    assert model.invoke(QUESTION).content
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in model.stream(QUESTION))
    assert len(model.batch([QUESTION] * 3)) == 3


# pydantic-ai


def pydantic_agent(output: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE_URL, api_key=KEY))
    return Agent(model, output_type=output, model_settings={"max_tokens": 100, "temperature": 0.0})


@check("pydantic-ai-slim", "text, output by schema")
def pydantic_outputs() -> None:
    from pydantic_ai import NativeOutput

    assert pydantic_agent(str).run_sync(QUESTION).output
    assert isinstance(pydantic_agent(NativeOutput(City)).run_sync(QUESTION).output, City)


# openai-agents


@check("openai-agents", "chat model: text, schema, tools")
def agents_chat() -> None:
    agents_with("chat")


@check("openai-agents", "responses model, its default: text, schema, tools")
def agents_responses() -> None:
    agents_with("responses")


def agents_with(kind: str) -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY)
    made = agents.OpenAIChatCompletionsModel if kind == "chat" else agents.OpenAIResponsesModel

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city"""
        return f"sunny in {city}"

    async def run(**options: Any) -> Any:
        settings = agents.ModelSettings(max_tokens=100, temperature=0, **options.pop("settings", {}))
        agent = agents.Agent(name="a", model=made(MODEL, client), model_settings=settings, **options)
        return (await agents.Runner.run(agent, QUESTION, max_turns=3)).final_output

    async def all_of_them() -> None:
        assert await run()
        assert isinstance(await run(output_type=City), City)
        forced = {"tool_choice": "required", "parallel_tool_calls": False}
        stop = "stop_on_first_tool"
        said = await run(tools=[get_weather], settings=forced, tool_use_behavior=stop)
        assert said.startswith("sunny in"), said

    asyncio.run(all_of_them())


if __name__ == "__main__":
    main()
