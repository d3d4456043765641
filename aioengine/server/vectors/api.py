"""Types of the endpoints for vectors, labels and scores: OpenAI's field names, and vLLM's, Jina's and
Cohere's."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import Meta

from aioengine.server.openai import api

T = TypeVar("T")

MAX_INPUTS = 2048
"""Texts in one request; OpenAI's bound."""
Texts = Annotated[list[str], Meta(min_length=1, max_length=MAX_INPUTS)]


class VectorFields(api.ModelFields, kw_only=True):
    """Fields that all of them share."""

    truncate_prompt_tokens: api.Whole | None = None
    """Keep only this many last tokens of each text; -1 keeps as many as the context has room for."""
    add_special_tokens: bool | None = None
    """True if it is not given."""
    request_id: api.RequestId | None = None
    """End of the answer's id."""
    priority: api.Priority | None = None

    # Accepted, and without effect on the answer
    user: api.Ignored = api.IGNORED


class InputFields(VectorFields, kw_only=True):
    input: Any
    """A text, a list of texts, a list of token ids, or a list of such lists."""


class PoolingRequest(InputFields, kw_only=True):
    pooling: Literal["auto", "mean", "last", "cls"] | None = None
    """How the hidden states become one vector. "auto", the default, is what the adapter or the model says."""
    encoding_format: Literal["float", "base64"] | None = None
    """"base64": of float32, little endian."""


class EmbeddingRequest(PoolingRequest, kw_only=True):
    dimensions: api.Positive | None = None
    """Keep only this many numbers of each vector, the first ones."""
    normalize: bool | None = None
    """Whether vectors have length 1; true if it is not given."""


class ScoreRequest(VectorFields, kw_only=True):
    """One text against one or many, or pairs of two lists of equal length."""

    text_1: str | Texts
    text_2: str | Texts


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


class PoolingData(msgspec.Struct, kw_only=True):
    index: int
    data: list[float] | str
    object: Literal["pooling"] = "pooling"


class ClassData(msgspec.Struct, kw_only=True):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ScoreData(msgspec.Struct, kw_only=True):
    index: int
    score: float
    object: Literal["score"] = "score"


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
