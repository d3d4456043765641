"""The clients' helpers and frameworks: what they add to requests, and what they make of answers and streams.

What else OpenAI's and Anthropic's clients are asked for is in ``tests/server``, which uses them, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
from typing import Any, Literal

from harness import ADAPTER, BASE_URL, KEY, MODEL, URL, USER, WEATHER, check, main
from pydantic import BaseModel, Field, ValidationError

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


def sync_client() -> Any:
    import openai

    return openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)


def async_client() -> Any:
    import openai

    return openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)


# openai


@check("openai", "async: raw and streaming responses, a stream that is left")
def openai_async() -> None:
    async def run() -> None:
        async with async_client() as client:
            ask: dict[str, Any] = {"model": MODEL, "messages": USER, **SMALL}
            raw = await client.chat.completions.with_raw_response.create(**ask)
            answer = raw.parse()
            assert raw.headers["x-request-id"] == answer._request_id
            assert (await client.chat.completions.create(**ask))._request_id
            async with client.chat.completions.with_streaming_response.create(**ask) as response:
                again = json.loads(await response.read())
            assert again["choices"][0]["message"]["content"] == answer.choices[0].message.content
            counts = ("prompt_tokens", "completion_tokens", "total_tokens")  # cached ones may differ
            assert [again["usage"][name] for name in counts] == [
                getattr(answer.usage, name) for name in counts
            ]
            raw = await client.chat.completions.with_raw_response.create(**ask, stream=True)
            chunks = [chunk async for chunk in raw.parse()]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == answer.choices[0].message.content
            stream = await client.chat.completions.create(**{**ask, "max_tokens": 300}, stream=True)
            await anext(aiter(stream))
            await stream.close()

    asyncio.run(run())


@check("openai", "stream(): its events")
def openai_stream_events() -> None:
    client = sync_client()
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, **SMALL}
    with client.chat.completions.stream(**ask, response_format=City) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert isinstance(final.choices[0].message.parsed, City)
    some: dict[str, Any] = {**ask, "max_tokens": 400, "logprobs": True, "top_logprobs": 2, "n": 2}
    with client.chat.completions.stream(**some, response_format=City) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"logprobs.content.delta", "logprobs.content.done"} <= set(kinds) and len(final.choices) == 2
    assert all(choice.logprobs.content for choice in final.choices)
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
    answer = client.chat.completions.create(
        model=MODEL,
        messages=USER,
        max_completion_tokens=5,
        metadata={"a": "b"},
        modalities=["text"],
        parallel_tool_calls=True,
        prompt_cache_key="k",
        prompt_cache_options={"ttl": "30m"},
        safety_identifier="s",
        seed=1,
        service_tier="auto",
        store=False,
        stop=["\n\n\n"],
        user="u",
        verbosity="medium",
        extra_body={"prompt_cache_retention": "24h"},
    )
    assert answer.choices[0].finish_reason
    answer = client.responses.create(
        model=MODEL,
        input=QUESTION,
        max_output_tokens=16,
        temperature=0,
        include=["reasoning.encrypted_content"],
        max_tool_calls=3,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        prompt_cache_key="k",
        prompt_cache_options={"ttl": "30m"},
        reasoning={"effort": "none", "summary": "auto"},
        safety_identifier="s",
        service_tier="auto",
        store=False,
        text={"verbosity": "low"},
        top_logprobs=0,
        truncation="disabled",
        user="u",
    )
    assert answer.metadata == {"a": "b"} and answer.output_text
    stream = client.responses.create(
        model=MODEL, input=QUESTION, stream=True, stream_options={"include_obfuscation": False}
    )
    stream.close()


@check("openai", "responses: stream() with a schema and with tools, a second turn")
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
    tool = {"type": "function", **WEATHER["function"], "strict": True}  # type: ignore[dict-item]
    with client.responses.stream(**ask, tools=[tool], tool_choice="required") as stream:
        done = [event for event in stream if event.type == "response.function_call_arguments.done"]
        called = stream.get_final_response()
    [call] = [item for item in called.output if item.type == "function_call"]
    assert [event.arguments for event in done] == [call.arguments]
    helper = openai.pydantic_function_tool(get_weather)["function"]
    parsed = client.responses.parse(**ask, tools=[{"type": "function", **helper}], tool_choice="required")
    assert [item.type for item in parsed.output] == ["function_call"]
    turn = [
        {"role": "user", "content": QUESTION},
        *called.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    after = client.responses.create(**{**ask, "input": turn}, instructions="Be brief.", tools=[tool])
    assert after.output_text
    with client.responses.with_streaming_response.create(**ask) as response:
        assert response.headers["x-request-id"] and response.parse().output_text


# anthropic


def anthropic_fields() -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 120, "messages": USER, "temperature": 0}


TOOL = {
    **{name: WEATHER["function"][name] for name in ("name", "description")},  # type: ignore[index]
    "input_schema": get_weather.model_json_schema(),
}


@check("anthropic", "stream() with tools, a second turn, counting")
def anthropic_tools() -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    fields = {key: value for key, value in anthropic_fields().items() if key != "temperature"}
    fields |= {"extra_body": {"temperature": 0}, "tools": [TOOL]}
    with client.messages.stream(**fields, tool_choice={"type": "any"}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert {"message_start", "input_json", "content_block_stop", "message_stop"} <= set(kinds)
    [use] = [block for block in final.content if block.type == "tool_use"]
    assert final.stop_reason == "tool_use" and set(use.input) == {"city"}
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny", "is_error": False}
    turns = [*USER, {"role": "assistant", "content": final.content}, {"role": "user", "content": [result]}]
    after = client.messages.create(**{**fields, "messages": turns}, tool_choice={"type": "none"})
    assert [block.type for block in after.content] == ["text"]
    assert client.messages.count_tokens(model=MODEL, messages=turns, tools=[TOOL]).input_tokens > 10
    raw = client.messages.with_raw_response.create(
        **fields, tool_choice={"type": "tool", "name": TOOL["name"]}
    )
    assert raw.headers["x-request-id"] and raw.parse().stop_reason == "tool_use"


@check("anthropic", "parse(), effort, cache_control, async, errors")
def anthropic_more() -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
    fields = {"model": MODEL, "max_tokens": 120, "messages": USER, "extra_body": {"temperature": 0}}
    assert isinstance(client.messages.parse(**fields, output_format=City).parsed_output, City)
    assert client.messages.create(**fields, output_config={"effort": "low"}).content
    kept = {"type": "text", "text": "Be very brief. " * 20, "cache_control": {"type": "ephemeral"}}
    first, again = (client.beta.messages.create(**fields, system=[kept]) for _ in range(2))
    assert first.content and first.usage.input_tokens and again.usage.cache_read_input_tokens

    async def run() -> None:
        async with (
            anthropic.AsyncAnthropic(base_url=URL, api_key=KEY, max_retries=0) as asking,
            asking.messages.stream(**fields) as stream,
        ):
            text = "".join([part async for part in stream.text_stream])
            assert (await stream.get_final_message()).content[0].text == text

    asyncio.run(run())
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    for kind, wrong in (
        (anthropic.NotFoundError, {"model": "nobody"}),
        (anthropic.BadRequestError, {"messages": [{"role": "user", "content": [image]}]}),
        (anthropic.BadRequestError, {"max_tokens": 0}),
    ):
        told: Any = None
        try:
            client.messages.create(**{**fields, **wrong})
        except kind as error:
            told = error.body
        assert told and told["error"]["message"], wrong
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
    runner = client.beta.messages.tool_runner(
        model=MODEL,
        max_tokens=60,
        messages=USER,
        tools=[get_weather],
        max_iterations=2,
        extra_body={"temperature": 0},
    )
    assert runner.until_done().content


# litellm


@check("litellm", "tools, pydantic, text, both of Anthropic's routes, streams, errors, embeddings, rerank")
def litellm_all() -> None:
    import litellm

    route: dict[str, Any] = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE_URL, "api_key": KEY, **SMALL}
    made = litellm.completion(
        messages=USER,
        drop_params=True,
        thinking={"type": "disabled"},
        seed=1,
        n=2,
        **{**route, "model": f"openai/{MODEL}"},
    )
    assert len(made.choices) == 2
    made = litellm.completion(messages=USER, response_format=City, **route)
    City.model_validate_json(made.choices[0].message.content)
    with contextlib.suppress(litellm.NotFoundError):
        litellm.completion(messages=USER, **{**route, "model": "hosted_vllm/nobody"})
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


@check("langchain-openai", "bind_tools: every tool_choice, streams, log-probabilities, events")
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
    for choice in ("auto", "none"):
        assert chat_openai().bind_tools([get_weather], tool_choice=choice).invoke(QUESTION)
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
    found = chat_openai(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert found.response_metadata["logprobs"]["content"]

    async def run() -> list[str]:
        return [event["event"] async for event in chat_openai().astream_events(QUESTION)]

    assert "on_chat_model_stream" in asyncio.run(run())


# instructor


@check("instructor", "every mode, iterables, parallel tools, async, Anthropic's")
def instructor_modes() -> None:
    import anthropic
    import instructor
    import openai
    from instructor.core import IncompleteOutputException, InstructorRetryException

    plain = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
    ask: dict[str, Any] = {"model": MODEL, "messages": USER, **SMALL, "max_retries": 0}
    modes = instructor.Mode
    for mode in (modes.TOOLS, modes.TOOLS_STRICT, modes.JSON_SCHEMA):
        client = instructor.from_openai(plain, mode=mode)
        shape = client.chat.completions.create(response_model=Shape, **{**ask, "max_tokens": 400})
        assert isinstance(shape, Shape), mode
    for mode in (modes.JSON, modes.MD_JSON):  # without a schema: the model decides what comes
        client = instructor.from_openai(plain, mode=mode)
        came: list[Any] = []
        client.on("completion:response", came.append)
        with contextlib.suppress(InstructorRetryException, IncompleteOutputException):
            client.chat.completions.create(response_model=City, **ask)
        [answer] = came
        choice = answer.choices[0]
        if mode == modes.JSON and choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        assert choice.message.content and answer.usage.completion_tokens, mode
    client = instructor.from_openai(plain, mode=modes.TOOLS)
    unread: list[Any] = []
    try:
        many = list(client.chat.completions.create_iterable(response_model=City, **ask))
        assert all(isinstance(one, City) for one in many)
    except ValidationError as error:
        unread = [one["input"] for one in error.errors()]
    assert unread in ([], [{}, {}])  # its schema does not require the list, and it reads "{}" as a city
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

    async def run() -> Any:
        client = instructor.from_openai(async_client(), mode=modes.TOOLS)
        return await client.chat.completions.create(response_model=City, **ask)

    assert isinstance(asyncio.run(run()), City)
    own = instructor.from_anthropic(
        anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0), mode=modes.ANTHROPIC_TOOLS
    )
    fields = {"model": MODEL, "max_tokens": 120, "messages": USER, "max_retries": 0}
    fields |= {"extra_body": {"temperature": 0}}
    assert isinstance(own.messages.create(response_model=City, **fields), City)


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
    *_, last = structured.stream_chat(chat)  # it does not require the call, so the model may write text
    assert hasattr(last.raw, "is_capital")
    *_, last = model.stream_chat_with_tools([tool], chat_history=chat, tool_required=True)
    [call] = model.get_tool_calls_from_response(last)
    assert call.tool_name == "get_weather" and set(call.tool_kwargs) == {"city"}


# openai-agents


@check("openai-agents", "both models: streams with tools, output by schema")
def agents_all() -> None:
    import agents

    agents.set_tracing_disabled(True)

    @agents.function_tool
    def get_weather(city: str) -> str:
        """The weather in a city"""
        return f"sunny in {city}"

    async def run(kind: Any) -> None:
        settings = agents.ModelSettings(max_tokens=120, temperature=0)
        agent = agents.Agent(
            name="a", model=kind(MODEL, async_client()), model_settings=settings, output_type=City
        )
        assert isinstance((await agents.Runner.run(agent, QUESTION)).final_output, City)
        settings = agents.ModelSettings(max_tokens=60, temperature=0, tool_choice="required")
        agent = agents.Agent(
            name="a", model=kind(MODEL, async_client()), model_settings=settings, tools=[get_weather]
        )
        result = agents.Runner.run_streamed(agent, QUESTION, max_turns=3)
        kinds = [event.type async for event in result.stream_events()]
        assert {"raw_response_event", "run_item_stream_event"} <= set(kinds) and result.final_output

    for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
        asyncio.run(run(kind))


if __name__ == "__main__":
    main()
