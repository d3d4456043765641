"""``/v1/embeddings``, ``/classify`` and ``/rerank``: prompts in, numbers out. Field names are
OpenAI's, and vLLM's, Jina's and Cohere's."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from sys import getsizeof
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from aioengine.request import PoolingKind
from aioengine.runtime.output import RequestOutput
from aioengine.runtime.requests.vectors import classification_of, embedding_of, pooling_params, scores_of
from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import invalid
from aioengine.server.openai import api
from aioengine.server.openai.replies import Reply
from aioengine.server.prompts import encode, encode_pairs, prompts_of

T = TypeVar("T")

MAX_INPUTS = 2048
"""Texts in one request; OpenAI's bound."""
Form = Callable[[Sequence[RequestOutput]], dict[str, Any]]
"""Makes an answer's own fields from the outputs. It must keep nothing large of the request."""


class VectorFields(api.ModelFields, kw_only=True):
    """Fields that all of them share."""

    add_special_tokens: bool | None = None
    """True if it is not given."""
    priority: api.Priority | None = None

    # Accepted, and without effect on the answer
    user: api.Ignored = api.IGNORED


class InputFields(VectorFields, kw_only=True):
    input: api.Prompts


class EmbeddingRequest(InputFields, kw_only=True):
    pooling: Literal["auto", "mean", "last", "cls"] | None = None
    """How the hidden states become one vector. "auto", the default, is what the adapter or the model says."""
    encoding_format: Literal["float", "base64"] | None = None
    """"base64": of float32, little endian."""
    dimensions: api.Positive | None = None
    """Keep only this many numbers of each vector, the first ones."""
    normalize: bool | None = None
    """Whether vectors have length 1; true if it is not given."""


class Document(api.Strict, kw_only=True):
    text: str


class RerankRequest(VectorFields, kw_only=True):
    query: str
    documents: Annotated[list[str | Document], Meta(min_length=1, max_length=MAX_INPUTS)]
    top_n: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Return only this many of the best; 0 returns all."""
    return_documents: bool | None = None
    """True if it is not given."""


class VectorUsage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingData(msgspec.Struct, kw_only=True):
    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class ClassData(msgspec.Struct, kw_only=True):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class VectorList(msgspec.Struct, Generic[T], kw_only=True):
    """The answer of all routes but ``/rerank``; ``data`` is in the order of the input."""

    id: str
    model: str
    usage: VectorUsage
    created: int
    data: list[T]
    object: Literal["list"] = "list"


class RankedData(msgspec.Struct, kw_only=True, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class Ranked(msgspec.Struct, kw_only=True):
    """``results`` begin with the best."""

    id: str
    model: str
    created: int
    results: list[RankedData]
    usage: VectorUsage


class VectorReply(Reply):
    """The reply of one of these endpoints, which has no streams."""

    def __init__(self, head: dict[str, Any], form: Form) -> None:
        self._head, self._form = head, form

    def whole(self, outputs: Sequence[RequestOutput], usage: api.Usage) -> bytes:
        used = VectorUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens)
        return msgspec.json.encode({**self._head, **self._form(outputs), "usage": used})


async def embeddings(call: Call, data: EmbeddingRequest) -> Annotated[Answer, VectorList[EmbeddingData]]:
    """Vectors of texts."""
    normalize, dimensions, encoding = data.normalize is not False, data.dimensions, data.encoding_format

    def item(index: int, output: RequestOutput) -> EmbeddingData:
        found = embedding_of(output, normalize=normalize, dimensions=dimensions)
        return EmbeddingData(index=index, embedding=_encoded(found.vector, encoding))

    return await _of_each(call, data, data.pooling or "auto", item, "embd-")


async def classify(call: Call, data: InputFields) -> Annotated[Answer, VectorList[ClassData]]:
    """Labels of texts."""
    names = await call.context.engine.label_names.result()

    def item(index: int, output: RequestOutput) -> ClassData:
        one = classification_of(output, names)
        count, probs = len(one.probabilities), _encoded(one.probabilities)
        return ClassData(index=index, label=one.label, probs=probs, num_classes=count)

    return await _of_each(call, data, "classify", item, "classify-")


async def rerank(call: Call, data: RerankRequest) -> Annotated[Answer, Ranked]:
    """Documents, the best first: scored with the query by an adapter's head of one label, or, without a head,
    by the cosine of the two vectors."""
    texts = [document if isinstance(document, str) else document.text for document in data.documents]
    top_n, query = data.top_n or None, data.query
    shown = None if data.return_documents is False else texts
    labels = await call.context.engine.head_labels(call.wanted_adapter(data))
    if labels > 1:
        text = f"its head has {labels} labels, but a rank needs a head of one label, or none; use /classify"
        raise invalid("model", text)
    kind: PoolingKind = "classify" if labels else "auto"
    places: list[tuple[int, int]] = []
    if labels:
        prompts = await encode_pairs(call, [(query, text) for text in texts])
    else:
        unique = list(dict.fromkeys((query, *texts)))  # each is computed once
        prompts = await encode(call, unique, special=data.add_special_tokens is not False, field="documents")
        place = {text: index for index, text in enumerate(unique)}
        places = [(0, place[text]) for text in texts]

    def ranked(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        scores = scores_of(outputs, labels, places)
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[:top_n]
        documents = [None if shown is None else Document(text=shown[index]) for index in best]
        results = [
            RankedData(index=index, relevance_score=scores[index], document=document)
            for index, document in zip(best, documents, strict=True)
        ]
        return {"results": results}

    answer = _answer(call, data, prompts, kind, ranked, "rerank-")
    answer.kept = sum(map(getsizeof, shown or ()))
    return answer


def _answer(
    call: Call, data: VectorFields, prompts: list[list[int]], kind: PoolingKind, form: Form, prefix: str
) -> Answer:
    fields = api.GenerationFields(model=data.model, adapters=data.adapters, priority=data.priority)
    answer = Answer(call, fields, prompts, pooling_params(kind), prefix=prefix)
    head = {name: value for name, value in answer.head.items() if name != "seed"}
    answer.reply = VectorReply(head, form)
    return answer


async def _of_each(
    call: Call, data: InputFields, kind: PoolingKind, item: Callable[[int, RequestOutput], Any], prefix: str
) -> Answer:
    """Answer with a list that has an item for each input."""
    special = data.add_special_tokens is not False
    prompts = await prompts_of(call, data.input, field="input", most=MAX_INPUTS, special=special)

    def listed(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {"object": "list", "data": list(map(item, range(len(outputs)), outputs))}

    return _answer(call, data, prompts, kind, listed, prefix)


def _encoded(vector: Sequence[float], encoding: str | None = None) -> Any:
    """Encode each vector to JSON by itself, because there may be thousands, and a call for all of them would
    occupy the interpreter."""
    if encoding != "base64":
        return msgspec.Raw(msgspec.json.encode(list(vector)))
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
