"""``/v1/embeddings``, ``/pooling``, ``/classify``, ``/score`` and ``/rerank``: prompts in, numbers out."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import Any, Literal

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody
from litestar.response import Response

from aioengine.runtime.output import RequestOutput
from aioengine.runtime.requests.vectors import (
    classification_of,
    cosines,
    embedding_of,
    pooling_params,
    sigmoid,
)
from aioengine.runtime.text_work import size_of_all
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.errors import ApiError
from aioengine.server.framework import RESPONSES, Handled, record_of
from aioengine.server.openai.api import GenerationFields, Usage
from aioengine.server.openai.sampling import last_tokens
from aioengine.server.vectors import api

Form = Callable[[Sequence[RequestOutput], str, api.VectorUsage], api.VectorList | api.Ranked]
"""Makes the answer from the outputs, its id, and the usage."""


def vector_routes(context: Context) -> list[HTTPRouteHandler]:
    @post("/v1/embeddings", status_code=200, responses=RESPONSES, summary="Vectors of texts")
    async def embeddings(
        data: JSONBody[api.EmbeddingRequest], request: Request[Any, Any, Any]
    ) -> Response[api.EmbeddingList]:
        record = record_of(request)
        prompts = await _prompts(context, data, data.input, record)
        normalize, dimensions, encoding = data.normalize is not False, data.dimensions, data.encoding_format
        shared = _shared(context, data.model)

        def vector(output: RequestOutput) -> Any:
            found = embedding_of(output, normalize=normalize, dimensions=dimensions)
            return _encoded(found.vector, encoding)

        def form(outputs: Sequence[RequestOutput], id_: str, usage: api.VectorUsage) -> api.EmbeddingList:
            items = [api.EmbeddingData(index=i, embedding=vector(output)) for i, output in enumerate(outputs)]
            return api.EmbeddingList(data=items, id=id_, usage=usage, **shared)

        return _handled(context, data, prompts, data.pooling or "auto", form, record, prefix="embd-")

    @post("/pooling", status_code=200, responses=RESPONSES, summary="Vectors of texts, of any length")
    async def pooling(
        data: JSONBody[api.PoolingRequest], request: Request[Any, Any, Any]
    ) -> Response[api.PoolingList]:
        record = record_of(request)
        prompts = await _prompts(context, data, data.input, record)
        encoding, shared = data.encoding_format, _shared(context, data.model)

        def form(outputs: Sequence[RequestOutput], id_: str, usage: api.VectorUsage) -> api.PoolingList:
            vectors = [_encoded(output.pooled or [], encoding) for output in outputs]
            items = [api.PoolingData(index=i, data=vector) for i, vector in enumerate(vectors)]
            return api.PoolingList(data=items, id=id_, usage=usage, **shared)

        return _handled(context, data, prompts, data.pooling or "auto", form, record, prefix="pool-")

    @post("/classify", status_code=200, responses=RESPONSES, summary="Labels of texts")
    async def classify(
        data: JSONBody[api.ClassifyRequest], request: Request[Any, Any, Any]
    ) -> Response[api.ClassList]:
        record = record_of(request)
        prompts = await _prompts(context, data, data.input, record)
        names = await context.label_names()
        shared = _shared(context, data.model)

        def item(index: int, output: RequestOutput) -> api.ClassData:
            found = classification_of(output, names)
            return api.ClassData(
                index=index,
                label=found.label,
                probs=_encoded(found.probabilities, "float"),
                num_classes=len(found.probabilities),
            )

        def form(outputs: Sequence[RequestOutput], id_: str, usage: api.VectorUsage) -> api.ClassList:
            items = [item(i, output) for i, output in enumerate(outputs)]
            return api.ClassList(data=items, id=id_, usage=usage, **shared)

        return _handled(context, data, prompts, "classify", form, record, prefix="classify-")

    @post(["/score", "/v1/score"], status_code=200, responses=RESPONSES, summary="How well texts fit")
    async def score(
        data: JSONBody[api.ScoreRequest], request: Request[Any, Any, Any]
    ) -> Response[api.ScoreList]:
        firsts = [data.text_1] if isinstance(data.text_1, str) else data.text_1
        seconds = [data.text_2] if isinstance(data.text_2, str) else data.text_2
        if len(firsts) == 1:
            firsts = firsts * len(seconds)
        if len(firsts) != len(seconds):
            raise ApiError(
                400,
                f"text_1: has {len(firsts)} texts, text_2 has {len(seconds)}; give one text_1, or as many",
                param="text_1",
                code="invalid_value",
            )

        shared = _shared(context, data.model)

        def form(scores: list[float], id_: str, usage: api.VectorUsage) -> api.ScoreList:
            items = [api.ScoreData(index=i, score=score) for i, score in enumerate(scores)]
            return api.ScoreList(data=items, id=id_, usage=usage, **shared)

        return await _scored(context, data, firsts, seconds, form, record_of(request), prefix="score-")

    @post(
        ["/rerank", "/v1/rerank", "/v2/rerank"],
        status_code=200,
        responses=RESPONSES,
        summary="Documents, the best first",
    )
    async def rerank(
        data: JSONBody[api.RerankRequest], request: Request[Any, Any, Any]
    ) -> Response[api.Ranked]:
        texts = [document if isinstance(document, str) else document.text for document in data.documents]
        model, top_n = data.model, data.top_n or None
        shown = None if data.return_documents is False else texts

        def form(scores: list[float], id_: str, usage: api.VectorUsage) -> api.Ranked:
            best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
            results = [
                api.RankedData(
                    index=index,
                    relevance_score=scores[index],
                    document=None if shown is None else api.Document(text=shown[index]),
                )
                for index in best
            ]
            return api.Ranked(id=id_, model=model, results=results, usage=usage)

        queries, kept = [data.query] * len(texts), sum(map(getsizeof, shown or ()))
        return await _scored(
            context, data, queries, texts, form, record_of(request), prefix="rerank-", kept=kept
        )

    return [embeddings, pooling, classify, score, rerank]


class VectorReply:
    """The reply of one of these endpoints, which has no streams."""

    def __init__(self, reply_id: str, form: Form) -> None:
        self._id = reply_id
        self._form = form

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        raise NotImplementedError

    def last_events(self, usage: Usage) -> bytes:
        raise NotImplementedError

    def failure(self, error: ApiError) -> bytes:
        raise NotImplementedError

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        used = api.VectorUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens)
        return msgspec.json.encode(self._form(outputs, self._id, used))


def _handled(
    context: Context,
    data: api.VectorFields,
    prompts: list[list[int]],
    pooling: Literal["auto", "mean", "last", "cls", "classify"],
    form: Form,
    record: RequestRecord,
    *,
    prefix: str,
    kept: int = 0,
) -> Handled:
    """Build the answer. ``form`` must keep nothing large of the request but what ``kept`` counts."""
    fields = GenerationFields(
        model=data.model, adapters=data.adapters, request_id=data.request_id, priority=data.priority
    )
    generation = context.generation(fields, prompts, pooling_params(pooling), None, record, prefix=prefix)
    reply = VectorReply(generation.reply_id, form)
    return Handled(context, generation, reply, stream=False, record=record, kept=kept)


async def _scored(
    context: Context,
    data: api.VectorFields,
    firsts: list[str],
    seconds: list[str],
    form: Callable[[list[float], str, api.VectorUsage], api.VectorList | api.Ranked],
    record: RequestRecord,
    *,
    prefix: str,
    kept: int = 0,
) -> Handled:
    """Score pairs: each by an adapter's head of one label, or, without a head, by the cosine of the two
    vectors. ``form`` keeps ``kept`` bytes of the request."""
    labels = await context.engine.head_labels(context.wanted(data, record))
    if labels > 1:
        raise ApiError(
            400,
            f"model: its head has {labels} labels, but a score needs a head of one label, or none; use "
            "/classify",
            param="model",
            code="invalid_value",
        )
    if labels == 1:
        prompts = await context.encode_pairs(list(zip(firsts, seconds, strict=True)), owner=record.owner)
        prompts = _bounded(context, data, prompts)

        def by_head(
            outputs: Sequence[RequestOutput], id_: str, usage: api.VectorUsage
        ) -> api.VectorList | api.Ranked:
            return form([sigmoid((output.pooled or [0.0])[0]) for output in outputs], id_, usage)

        return _handled(context, data, prompts, "classify", by_head, record, prefix=prefix, kept=kept)
    texts = list(dict.fromkeys((*firsts, *seconds)))  # each is computed once
    prompts = await _prompts(context, data, texts, record, most=2 * api.MAX_INPUTS)
    place = {text: index for index, text in enumerate(texts)}
    pairs = [(place[a], place[b]) for a, b in zip(firsts, seconds, strict=True)]

    def by_cosine(
        outputs: Sequence[RequestOutput], id_: str, usage: api.VectorUsage
    ) -> api.VectorList | api.Ranked:
        return form(cosines([output.pooled or [] for output in outputs], pairs), id_, usage)

    return _handled(context, data, prompts, "auto", by_cosine, record, prefix=prefix, kept=kept)


async def _prompts(
    context: Context, data: api.VectorFields, given: Any, record: RequestRecord, *, most: int = api.MAX_INPUTS
) -> list[list[int]]:
    """Tokenize the input, if it is text. Raises ApiError."""
    items: Any = given
    if isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int):
        items = [given]
    if isinstance(items, list) and len(items) > most:
        raise ApiError(400, f"input: at most {most} texts", param="input", code="invalid_value")
    kinds = set(map(type, items)) if isinstance(items, list) else set()
    if kinds == {str}:
        tokens = await context.encode(
            items,
            owner=record.owner,
            add_special_tokens=data.add_special_tokens is not False,
            keep=context.kept(data.truncate_prompt_tokens, 0),
        )
        return _bounded(context, data, tokens)
    if kinds == {list}:
        bounded = _bounded(context, data, items)  # before they are looked at one by one
        work, size = context.engine.text_work, size_of_all(bounded)
        if await work.run(size, lambda: all(set(map(type, ids)) <= {int} for ids in bounded), record.owner):
            return bounded
    raise ApiError(
        400,
        "input: must be a text, a list of texts, a list of token ids or a list of such lists, not empty",
        param="input",
        code="invalid_value",
    )


def _bounded(context: Context, data: api.VectorFields, prompts: list[list[int]]) -> list[list[int]]:
    keep = context.kept(data.truncate_prompt_tokens, 0)
    if keep is not None:
        prompts = last_tokens(prompts, keep)
    longest = max(map(len, prompts))
    if longest > context.engine.plan.max_model_len:
        raise context.too_long(longest, field="input")
    return prompts


def _encoded(vector: Sequence[float], encoding: str | None) -> Any:
    """Encode each vector to JSON by itself, because there may be thousands, and a call for all of them would
    occupy the interpreter."""
    if encoding != "base64":
        return msgspec.Raw(msgspec.json.encode(list(vector)))
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _shared(context: Context, model: str) -> dict[str, Any]:
    """Return the fields of an answer that are known before its outputs."""
    return {"model": model, "created": context.created}
