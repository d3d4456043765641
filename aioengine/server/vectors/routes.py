"""``/v1/embeddings``, ``/pooling``, ``/classify``, ``/score`` and ``/rerank``: prompts in, numbers out."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterable, Sequence
from sys import getsizeof
from typing import Annotated, Any

import msgspec

from aioengine.request import PoolingKind
from aioengine.runtime.output import RequestOutput
from aioengine.runtime.requests.vectors import (
    classification_of,
    cosines,
    embedding_of,
    pooling_params,
    sigmoid,
)
from aioengine.runtime.text_work import size_of_all
from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, invalid
from aioengine.server.names import wanted_adapter
from aioengine.server.openai.api import GenerationFields, Usage
from aioengine.server.prompts import encode, encode_pairs, kept, last_tokens, too_long
from aioengine.server.vectors import api

Form = Callable[[Sequence[RequestOutput]], dict[str, Any]]
"""Makes an answer's own fields from the outputs. It must keep nothing large of the request."""


class VectorReply:
    """The reply of one of these endpoints, which has no streams."""

    def __init__(self, head: dict[str, Any], form: Form) -> None:
        self._head, self._form = head, form

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        used = api.VectorUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens)
        return msgspec.json.encode({**self._head, **self._form(outputs), "usage": used})

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        raise NotImplementedError

    def last_events(self, usage: Usage) -> bytes:
        raise NotImplementedError

    def failure(self, error: ApiError) -> bytes:
        raise NotImplementedError


async def embeddings(
    call: Call, data: api.EmbeddingRequest
) -> Annotated[Answer, api.VectorList[api.EmbeddingData]]:
    """Vectors of texts."""
    normalize, dimensions, encoding = data.normalize is not False, data.dimensions, data.encoding_format

    def item(index: int, output: RequestOutput) -> api.EmbeddingData:
        found = embedding_of(output, normalize=normalize, dimensions=dimensions)
        return api.EmbeddingData(index=index, embedding=_encoded(found.vector, encoding))

    prompts = await _prompts(call, data, data.input)
    return _answer(call, data, prompts, data.pooling or "auto", _each(item), "embd-")


async def pooling(call: Call, data: api.PoolingRequest) -> Annotated[Answer, api.VectorList[api.PoolingData]]:
    """Vectors of texts, of any length."""
    encoding = data.encoding_format

    def item(index: int, output: RequestOutput) -> api.PoolingData:
        return api.PoolingData(index=index, data=_encoded(output.pooled or [], encoding))

    prompts = await _prompts(call, data, data.input)
    return _answer(call, data, prompts, data.pooling or "auto", _each(item), "pool-")


async def classify(call: Call, data: api.InputFields) -> Annotated[Answer, api.VectorList[api.ClassData]]:
    """Labels of texts."""
    prompts = await _prompts(call, data, data.input)
    names = await call.context.label_names.result()

    def item(index: int, output: RequestOutput) -> api.ClassData:
        one = classification_of(output, names)
        count, probs = len(one.probabilities), _encoded(one.probabilities)
        return api.ClassData(index=index, label=one.label, probs=probs, num_classes=count)

    return _answer(call, data, prompts, "classify", _each(item), "classify-")


async def score(call: Call, data: api.ScoreRequest) -> Annotated[Answer, api.VectorList[api.ScoreData]]:
    """How well texts fit."""
    firsts = [data.text_1] if isinstance(data.text_1, str) else data.text_1
    seconds = [data.text_2] if isinstance(data.text_2, str) else data.text_2
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        text = f"has {len(firsts)} texts, text_2 has {len(seconds)}; give one text_1, or as many"
        raise invalid("text_1", text)

    def form(scores: list[float]) -> dict[str, Any]:
        return _list(api.ScoreData(index=i, score=score) for i, score in enumerate(scores))

    return await _scored(call, data, firsts, seconds, form, prefix="score-")


async def rerank(call: Call, data: api.RerankRequest) -> Annotated[Answer, api.Ranked]:
    """Documents, the best first."""
    texts = [document if isinstance(document, str) else document.text for document in data.documents]
    top_n = data.top_n or None
    shown = None if data.return_documents is False else texts

    def form(scores: list[float]) -> dict[str, Any]:
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
        documents = [None if shown is None else api.Document(text=shown[index]) for index in best]
        results = [
            api.RankedData(index=index, relevance_score=scores[index], document=document)
            for index, document in zip(best, documents, strict=True)
        ]
        return {"results": results}

    answer = await _scored(call, data, [data.query] * len(texts), texts, form, prefix="rerank-")
    answer.kept = sum(map(getsizeof, shown or ()))
    return answer


def _answer(
    call: Call,
    data: api.VectorFields,
    prompts: Sequence[list[int]],
    kind: PoolingKind,
    form: Form,
    prefix: str,
) -> Answer:
    fields = GenerationFields(
        model=data.model, adapters=data.adapters, request_id=data.request_id, priority=data.priority
    )
    answer = Answer(call.context, fields, prompts, pooling_params(kind), None, call.record, prefix=prefix)
    head = {"id": answer.id, "model": data.model, "created": call.context.created}
    answer.reply = VectorReply(head, form)
    return answer


async def _scored(
    call: Call,
    data: api.VectorFields,
    firsts: list[str],
    seconds: list[str],
    form: Callable[[list[float]], dict[str, Any]],
    *,
    prefix: str,
) -> Answer:
    """Score pairs: each by an adapter's head of one label, or, without a head, by the cosine of the two
    vectors."""
    labels = await call.context.engine.head_labels(wanted_adapter(call.context, data, call.record))
    if labels > 1:
        text = f"its head has {labels} labels, but a score needs a head of one label, or none; use /classify"
        raise invalid("model", text)
    if labels == 1:
        pairs = list(zip(firsts, seconds, strict=True))
        prompts = _bounded(call, data, await encode_pairs(call.context, pairs, call.record))

        def by_head(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
            return form([sigmoid((output.pooled or [0.0])[0]) for output in outputs])

        return _answer(call, data, prompts, "classify", by_head, prefix)
    texts = list(dict.fromkeys((*firsts, *seconds)))  # each is computed once
    prompts = await _prompts(call, data, texts, most=2 * api.MAX_INPUTS)
    place = {text: index for index, text in enumerate(texts)}
    places = [(place[a], place[b]) for a, b in zip(firsts, seconds, strict=True)]

    def by_cosine(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return form(cosines([output.pooled or [] for output in outputs], places))

    return _answer(call, data, prompts, "auto", by_cosine, prefix)


async def _prompts(
    call: Call, data: api.VectorFields, given: Any, *, most: int = api.MAX_INPUTS
) -> Sequence[list[int]]:
    """Tokenize the input, if it is text. Raises ApiError."""
    is_one = isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int)
    items: Any = [given] if is_one else given if isinstance(given, list) else []
    if len(items) > most:
        raise invalid("input", f"at most {most} texts")
    kinds = set(map(type, items))
    if kinds == {str}:
        keep = kept(call.context, data.truncate_prompt_tokens, 0)
        special = data.add_special_tokens is not False
        tokens = await encode(call.context, items, call.record, add_special_tokens=special, keep=keep)
        return _bounded(call, data, tokens)
    if kinds == {list}:
        bounded = _bounded(call, data, items)  # before they are looked at one by one
        work, size = call.context.engine.text_work, size_of_all(bounded)

        def are_ids() -> bool:
            return all(set(map(type, ids)) <= {int} for ids in bounded)

        if await work.run(size, are_ids, call.record.owner):
            return bounded
    raise invalid(
        "input", "must be a text, a list of texts, a list of token ids or a list of such lists, not empty"
    )


def _bounded(call: Call, data: api.VectorFields, prompts: list[list[int]]) -> Sequence[list[int]]:
    found = last_tokens(prompts, kept(call.context, data.truncate_prompt_tokens, 0))
    longest = max(map(len, found))
    if longest > call.context.max_model_len:
        raise too_long(call.context, longest, field="input")
    return found


def _each(item: Callable[[int, RequestOutput], msgspec.Struct]) -> Form:
    """Return the form of a list with an item for each input."""
    return lambda outputs: _list(map(item, range(len(outputs)), outputs))


def _list(items: Iterable[msgspec.Struct]) -> dict[str, Any]:
    return {"object": "list", "data": list(items)}


def _encoded(vector: Sequence[float], encoding: str | None = None) -> Any:
    """Encode each vector to JSON by itself, because there may be thousands, and a call for all of them would
    occupy the interpreter."""
    if encoding != "base64":
        return msgspec.Raw(msgspec.json.encode(list(vector)))
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
