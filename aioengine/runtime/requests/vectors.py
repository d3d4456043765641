"""Vectors, labels and scores from the pooled hidden states of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from aioengine.checks import check_value
from aioengine.errors import RequestInvalid
from aioengine.request import PoolingKind, RequestOptions, SamplingParams, Wanted
from aioengine.runtime.output import Classification, Embedding, RequestOutput

if TYPE_CHECKING:
    from aioengine.model.text.tokenizer import Tokenizer

MAX_DOCUMENTS = 1024
"""Maximum documents of one call of ``score``."""


def pooling_params(pooling: PoolingKind | None) -> SamplingParams:
    """Return the parameters of a request for a vector. Raises RequestInvalid."""
    return SamplingParams(max_tokens=0, pooling="auto" if pooling is None else pooling)


def embedding_of(output: RequestOutput, *, normalize: bool, dimensions: int | None) -> Embedding:
    """Cut the vector to its first ``dimensions``, as models that are trained for it allow
    (arXiv:2205.13147), and bring it to length 1. Raises RequestInvalid if it has not as many."""
    vector = output.pooled or []
    if dimensions is not None:
        most = Annotated[int, Meta(ge=1, le=len(vector))]
        check_value("dimensions", dimensions, most, RequestInvalid)
        vector = vector[:dimensions]
    if normalize:
        norm = _norm(vector)
        vector = [number / norm for number in vector]
    return Embedding(vector=vector, prompt_tokens=output.prompt_tokens, adapter=output.adapter)


def classification_of(output: RequestOutput, names: Sequence[str]) -> Classification:
    """Turn logits into a classification. ``names`` are the labels'; if they are not as many, it is
    transformers' own "LABEL_0", ..."""
    logits = output.pooled or []
    probabilities = probabilities_of(logits)
    best = max(range(len(logits)), key=logits.__getitem__)
    return Classification(
        logits=logits,
        probabilities=probabilities,
        label=names[best] if len(names) == len(logits) else f"LABEL_{best}",
        prompt_tokens=output.prompt_tokens,
        adapter=output.adapter,
    )


def probabilities_of(logits: Sequence[float]) -> list[float]:
    if len(logits) == 1:
        return [sigmoid(logits[0])]
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def scores_of(outputs: Sequence[RequestOutput], labels: int, pairs: Sequence[tuple[int, int]]) -> list[float]:
    """Score pairs of texts. With a head of one label each output is that of a pair; without, ``pairs`` has
    indices of outputs, whose vectors are compared. There may be thousands, so nothing is done number by
    number in Python; and torch may not be in this process. Blocking."""
    if labels:
        return [sigmoid((output.pooled or [0.0])[0]) for output in outputs]
    vectors = [output.pooled or [] for output in outputs]
    norms = [_norm(vector) for vector in vectors]
    return [
        sum(map(mul, vectors[first], vectors[second])) / (norms[first] * norms[second])
        for first, second in pairs
    ]


def _norm(vector: Sequence[float]) -> float:
    """Return the length, or a small number in place of zero."""
    return max(math.hypot(*vector), 1e-12)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def scaled_adapter(wanted: Wanted) -> str | None:
    """Return the only adapter that is asked for; None for the base model and for a mix of several, which has
    no head."""
    names = RequestOptions(adapter=wanted).named
    return names[0] if len(names) == 1 else None


def check_documents(query: object, documents: object) -> None:
    """Raise RequestInvalid unless these are texts, or lists of token ids, of a valid number."""
    if not isinstance(documents, Sequence) or isinstance(documents, str) or not documents:
        raise RequestInvalid("documents: expected a list of at least one text, or list of token ids")
    if len(documents) > MAX_DOCUMENTS:
        raise RequestInvalid(
            f"documents: has {len(documents)}, more than {MAX_DOCUMENTS}: send them in parts"
        )
    for text in (query, *documents):
        if not isinstance(text, (str, list)):
            raise RequestInvalid(
                f"query, documents: expected texts or lists of token ids, not {type(text).__name__}"
            )


def pair_tokens(
    tokenizer: Tokenizer | None, limit: int, query: str | list[int], document: str | list[int]
) -> list[int]:
    """Tokenize two texts together, or join two lists of tokens. Raises RequestInvalid."""
    if isinstance(query, list) and isinstance(document, list):
        return [*query, *document]
    if isinstance(query, list) or isinstance(document, list):
        raise RequestInvalid("query and documents: give only texts, or only lists of token ids")
    if tokenizer is None:
        raise RequestInvalid("the model has no tokenizer.json: give lists of token ids")
    return tokenizer.encode_all([(query, document)], limit=limit)[0]
