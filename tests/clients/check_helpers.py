"""The clients' helpers and frameworks: what they add to requests, and what they make of answers and streams.

What else OpenAI's and Anthropic's clients are asked for is in ``tests/server``, which uses them, too.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Any, Literal

from harness import ADAPTER, BASE_URL, KEY, MODEL, URL, USER, WEATHER, check, main
from pydantic import BaseModel, Field

QUESTION = "What is the weather in Paris?"
SMALL: dict[str, Any] = {"max_tokens": 120, "temperature": 0}


class City(BaseModel):
    """A city"""

    name: str = Field(max_length=12)
    is_capital: bool


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: Literal[1, 2]
    y: bool


class Shape(BaseModel):
    """Nested, optional, of a few values"""

    kind: Literal["circle", "square"]
    color: Color
    dashed: bool | None = None
    corners: list[Point] = Field(max_length=2)
    center: Point | None = None


class get_weather(BaseModel):  # the function's name
    """The weather in a city"""

    city: str = Field(max_length=12)


# openai


def sync_client() -> Any:
    import openai

    return openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)


@check("openai", "stream(): its events")
def openai_stream_events() -> None:
    client = sync_client()
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, **SMALL}
    with client.chat.completions.stream(**ask, response_format=City) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert isinstance(final.choices[0].message.parsed, City)
    import openai

    tool = openai.pydantic_function_tool(get_weather)
    with client.chat.completions.stream(
        **ask, tools=[tool], tool_choice="required", stream_options={"include_usage": True}
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert [event.name for event in done] == ["get_weather"] and final.usage.completion_tokens
    assert isinstance(done[0].parsed_arguments, get_weather)


@check("openai", "parse(): nested models, tools, and both")
def openai_parse() -> None:
    import openai

    client = sync_client()
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, **SMALL}
    answer = client.chat.completions.parse(**{**ask, "max_tokens": 400}, response_format=Shape)
    choice = answer.choices[0]
    assert isinstance(choice.message.parsed, Shape) and choice.message.parsed.color in Color
    tool = openai.pydantic_function_tool(get_weather)
    answer = client.chat.completions.parse(**ask, tools=[tool], tool_choice="required")
    [call] = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, get_weather)
    answer = client.chat.completions.parse(**ask, tools=[tool], response_format=City)
    assert isinstance(answer.choices[0].message.parsed, City)
    again = [*USER, answer.choices[0].message, {"role": "user", "content": "And Rome?"}]
    assert client.chat.completions.create(**{**ask, "messages": again}).choices[0].finish_reason


@check("openai", "fields that have no effect")
def openai_fields() -> None:
    client = sync_client()
    both: dict[str, Any] = {"metadata": {"a": "b"}, "parallel_tool_calls": True, "prompt_cache_key": "k"}
    both |= {"prompt_cache_options": {"ttl": "30m"}, "safety_identifier": "s", "service_tier": "auto"}
    both |= {"model": MODEL, "store": False, "user": "u"}
    chat: dict[str, Any] = {"modalities": ["text"], "seed": 1, "stop": ["\n\n\n"], "verbosity": "medium"}
    more = {"prompt_cache_retention": "24h"}
    answer = client.chat.completions.create(
        messages=USER, max_completion_tokens=5, extra_body=more, **both, **chat
    )
    assert answer.choices[0].finish_reason
    own: dict[str, Any] = {"include": ["reasoning.encrypted_content"], "max_tool_calls": 3, "top_logprobs": 0}
    own |= {"reasoning": {"effort": "none", "summary": "auto"}, "text": {"verbosity": "low"}}
    answer = client.responses.create(
        input=QUESTION, max_output_tokens=16, temperature=0, truncation="disabled", **both, **own
    )
    assert answer.metadata == {"a": "b"} and answer.output_text


@check("openai", "responses: stream() and parse() with a schema and with tools")
def openai_responses() -> None:
    import openai

    client = sync_client()
    ask: dict[str, Any] = {"model": MODEL, "input": QUESTION, "max_output_tokens": 120, "temperature": 0}
    with client.responses.stream(**ask, text_format=City) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert isinstance(final.output_parsed, City)
    parsed = client.responses.parse(**ask, text_format=Shape)
    assert parsed.status == "incomplete" or isinstance(parsed.output_parsed, Shape)
    helper = openai.pydantic_function_tool(get_weather)["function"]
    parsed = client.responses.parse(**ask, tools=[{"type": "function", **helper}], tool_choice="required")
    assert [item.type for item in parsed.output] == ["function_call"]


# anthropic


ANTHROPIC: dict[str, Any] = {"model": MODEL, "max_tokens": 120, "messages": USER}
ANTHROPIC["extra_body"] = {"temperature": 0}


@check("anthropic", "parse(), effort, cache_control, models")
def anthropic_more() -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    fields = ANTHROPIC
    assert isinstance(client.messages.parse(**fields, output_format=City).parsed_output, City)
    assert client.messages.create(**fields, output_config={"effort": "low"}).content
    kept = {"type": "text", "text": "Be very brief. " * 20, "cache_control": {"type": "ephemeral"}}
    first, again = (client.beta.messages.create(**fields, system=[kept]) for _ in range(2))
    assert first.content and first.usage.input_tokens and again.usage.cache_read_input_tokens
    assert ADAPTER in {model.id for model in client.models.list()}


@check("anthropic", "tool_runner: calls functions until there is an answer")
def anthropic_runner() -> None:
    import anthropic

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city

        Args:
            city: The city
        """
        return f"sunny in {city}"

    client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    runner = client.beta.messages.tool_runner(**ANTHROPIC, tools=[get_weather], max_iterations=2)
    assert runner.until_done().content


# litellm


@check("litellm", "tools, pydantic, text, both of Anthropic's routes, streams, embeddings, rerank")
def litellm_all() -> None:
    import litellm

    route: dict[str, Any] = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE_URL, "api_key": KEY, **SMALL}
    made = litellm.completion(messages=USER, response_format=City, **route)
    City.model_validate_json(made.choices[0].message.content)
    text = {**route, "model": f"text-completion-openai/{MODEL}"}
    assert litellm.text_completion(prompt="Hello", **text).choices[0].text
    bridged = asyncio.run(litellm.anthropic.messages.acreate(messages=USER, **route))
    assert bridged["content"]
    named = {"type": "function", "function": {"name": "get_weather"}}
    made = litellm.completion(messages=USER, tools=[WEATHER], tool_choice=named, **route)
    history = [*USER, made.choices[0].message, {"role": "tool", "tool_call_id": "c", "content": "sunny"}]
    history[-1]["tool_call_id"] = made.choices[0].message.tool_calls[0].id
    assert litellm.completion(messages=history, tools=[WEATHER], **route).choices[0].message.content

    async def run() -> Any:
        stream = await litellm.acompletion(
            messages=USER, stream=True, stream_options={"include_usage": True}, **route
        )
        return litellm.stream_chunk_builder([chunk async for chunk in stream], messages=USER)

    assert asyncio.run(run()).usage.completion_tokens
    own = {**route, "model": f"anthropic/{MODEL}", "api_base": URL}
    assert litellm.completion(messages=USER, **own).choices[0].message.content
    found = litellm.embedding(model=f"openai/{MODEL}", input=["a", "b"], api_base=BASE_URL, api_key=KEY)
    assert len(found.data) == 2
    ranked = litellm.rerank(
        model=f"hosted_vllm/{MODEL}", query="a", documents=["b", "a"], api_base=URL, api_key=KEY
    )
    assert len(ranked.results) == 2
    asked = {"model": f"openai/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "max_output_tokens": 20}
    answer = list(litellm.responses(input=QUESTION, stream=True, **asked))
    assert answer[-1].type in ("response.completed", "response.incomplete")


# langchain


def chat_openai(**options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, **SMALL, **options)


@check("langchain-openai", "structured output: each method, strict or not, each kind of schema")
def langchain_structured() -> None:
    from typing import TypedDict

    class Typed(TypedDict):
        """A city"""

        name: str

    closed = {
        "title": "city",
        "description": "A city",
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}},
        "required": ["name"],
        "additionalProperties": False,
    }
    for method in ("json_schema", "function_calling"):
        for strict, schema in ((None, City), (True, closed), (False, Typed)):
            model = chat_openai().with_structured_output(
                schema, method=method, strict=strict, include_raw=True
            )
            found = model.invoke(QUESTION)
            is_cut = found["raw"].response_metadata.get("finish_reason") == "length"
            assert found["parsing_error"] is None or is_cut, (method, strict, schema, found)
    for use in (True, False):
        model = chat_openai(use_responses_api=use).with_structured_output(City)
        assert isinstance(model.invoke(QUESTION), City)
        assert list(model.stream(QUESTION))


@check("langchain-openai", "bind_tools: tool_choice, streams, a second turn")
def langchain_tools() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city"""
        return f"sunny in {city}"

    named = {"type": "function", "function": {"name": "get_weather"}}
    one: dict[str, Any] = {"parallel_tool_calls": False}
    for choice, more in (("required", {}), (True, {"strict": True}), ("get_weather", one), (named, {})):
        model = chat_openai().bind_tools([get_weather], tool_choice=choice, **more)
        assert [call["name"] for call in model.invoke(QUESTION).tool_calls] == ["get_weather"]
    model = chat_openai().bind_tools([get_weather], tool_choice="any")
    whole: Any = None
    for chunk in model.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    [call] = whole.tool_calls
    turns = [
        HumanMessage(QUESTION),
        whole,
        ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"]),
    ]
    assert chat_openai().bind_tools([get_weather]).invoke(turns)
    responses = chat_openai(use_responses_api=True).bind_tools([get_weather], tool_choice="any")
    [call] = responses.invoke(QUESTION).tool_calls
    assert call["name"] == "get_weather"


# instructor


@check("instructor", "tools, schemas, parts of an answer, /v1/responses, Anthropic's")
def instructor_modes() -> None:
    import anthropic
    import instructor

    plain = sync_client()
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, **SMALL, "max_retries": 0}
    modes = instructor.Mode
    for mode in (modes.TOOLS, modes.TOOLS_STRICT, modes.JSON_SCHEMA):
        client = instructor.from_openai(plain, mode=mode)
        shape = client.chat.completions.create(response_model=Shape, **{**ask, "max_tokens": 400})
        assert isinstance(shape, Shape), mode
    client = instructor.from_openai(plain, mode=modes.TOOLS)
    *_, last = client.chat.completions.create_partial(response_model=City, **ask)
    assert last.name is not None
    responses = instructor.from_openai(plain, mode=modes.RESPONSES_TOOLS)
    made = responses.responses.create(
        model=MODEL,
        input=QUESTION,
        response_model=City,
        max_output_tokens=120,
        temperature=0,
        max_retries=0,
    )
    assert isinstance(made, City)

    own = instructor.from_anthropic(
        anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0), mode=modes.ANTHROPIC_TOOLS
    )
    assert isinstance(own.messages.create(response_model=City, max_retries=0, **ANTHROPIC), City)


# pydantic-ai


@check("pydantic-ai-slim", "both models, output by schema, streams, tools, several outputs")
def pydantic_all() -> None:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)
    settings: Any = {"max_tokens": 120, "temperature": 0.0}
    for made in (OpenAIChatModel, OpenAIResponsesModel):
        model = made(MODEL, provider=provider)
        agent: Any = Agent(model, output_type=NativeOutput(City), model_settings=settings)
        assert isinstance(agent.run_sync(QUESTION).output, City)
        either: Any = Agent(model, output_type=[City, get_weather], model_settings=settings)
        assert isinstance(either.run_sync(QUESTION).output, City | get_weather)

        async def run(model: Any = model) -> str:
            async with Agent(model, model_settings=settings).run_stream(QUESTION) as result:
                return "".join([part async for part in result.stream_text(delta=True)])

        assert asyncio.run(run())


# llama-index


@check("llama-index-llms-openai-like", "streams, tools, async")
def llama_index_more() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    def get_weather(city: str) -> str:
        """The weather in a city"""
        return f"sunny in {city}"

    model = OpenAILike(
        is_chat_model=True,
        is_function_calling_model=True,
        model=MODEL,
        api_base=BASE_URL,
        api_key=KEY,
        **SMALL,
    )
    chat = [ChatMessage(role="user", content=QUESTION)]
    assert "".join(part.delta or "" for part in model.stream_chat(chat))
    assert "".join(part.delta or "" for part in model.stream_complete(QUESTION))
    tool = FunctionTool.from_defaults(get_weather)
    answer = model.chat_with_tools([tool], chat_history=chat, tool_required=True)
    [call] = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather" and set(call.tool_kwargs) == {"city"}
    assert asyncio.run(model.achat(chat)).message.content
    structured = model.as_structured_llm(City)
    assert isinstance(structured.chat(chat).raw, City)
    *_, last = model.stream_chat_with_tools([tool], chat_history=chat, tool_required=True)
    [call] = model.get_tool_calls_from_response(last)
    assert call.tool_name == "get_weather" and set(call.tool_kwargs) == {"city"}


# openai-agents


@check("openai-agents", "both models: streams with tools, output by schema")
def agents_all() -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city"""
        return f"sunny in {city}"

    async def run(kind: Any) -> None:
        client = openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
        settings = agents.ModelSettings(max_tokens=120, temperature=0)
        agent = agents.Agent(name="a", model=kind(MODEL, client), model_settings=settings, output_type=City)
        assert isinstance((await agents.Runner.run(agent, QUESTION)).final_output, City)
        settings = agents.ModelSettings(max_tokens=60, temperature=0, tool_choice="required")
        agent = agents.Agent(
            name="a", model=kind(MODEL, client), model_settings=settings, tools=[get_weather]
        )
        result = agents.Runner.run_streamed(agent, QUESTION, max_turns=3)
        kinds = [event.type async for event in result.stream_events()]
        assert {"raw_response_event", "run_item_stream_event"} <= set(kinds) and result.final_output

    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        asyncio.run(run(kind))


if __name__ == "__main__":
    main()
