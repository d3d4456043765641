"""Vectors, labels and scores from the pooled hidden states of prompts."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from aioengine.checks import check_value
from aioengine.errors import RequestInvalid
from aioengine.request import PoolingKind, Prompt, RequestOptions, SamplingParams, Wanted
from aioengine.runtime.output import Classification, Embedding, RequestOutput, Scores
from aioengine.runtime.text_work import SHORT
from aioengine.tasks import together

if TYPE_CHECKING:
    from aioengine.runtime.client import EngineClient

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


def _check_documents(query: object, documents: object) -> None:
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


async def score(
    engine: EngineClient,
    query: str | list[int],
    documents: Sequence[str | list[int]],
    adapter: Wanted,
    tenant: str | None,
    **keywords: Any,
) -> Scores:
    """Score documents against a query; see ``AsyncEngine.score``. With a head of one label, the head scores
    each pair (a cross-encoder). What takes long is done in the threads of the engine's ``text_work``."""
    _check_documents(query, documents)
    labels = await engine.head_labels(adapter)
    if labels > 1:
        raise RequestInvalid(
            f"the adapter's head has {labels} labels, but a score needs a head of one label, or none; use "
            "classify"
        )

    def complete(prompt: Prompt, pooling: PoolingKind | None) -> Awaitable[RequestOutput]:
        return engine.complete(prompt, pooling_params(pooling), adapter=adapter, tenant=tenant, **keywords)

    if labels:
        pair = partial(_pair_tokens, engine, query)
        prompts = [
            await engine.text_work.run(len(query) + len(document), partial(pair, document), tenant)
            for document in documents
        ]
        outputs = await together([complete(prompt, "classify") for prompt in prompts])
    else:
        outputs = await together([complete(text, None) for text in (query, *documents)])
    pairs = [(0, index) for index in range(1, len(outputs))]
    size = SHORT + sum(len(output.pooled or ()) for output in outputs)
    scores = await engine.text_work.run(size, lambda: scores_of(outputs, labels, pairs), tenant)
    tokens = sum(output.prompt_tokens for output in outputs)
    return Scores(scores=scores, prompt_tokens=tokens, adapter=outputs[0].adapter)


def _pair_tokens(engine: EngineClient, query: str | list[int], document: str | list[int]) -> list[int]:
    """Tokenize two texts together, or join two lists of tokens. Raises RequestInvalid."""
    if isinstance(query, list) and isinstance(document, list):
        return [*query, *document]
    if isinstance(query, list) or isinstance(document, list):
        raise RequestInvalid("query and documents: give only texts, or only lists of token ids")
    if engine.tokenizer is None:
        raise RequestInvalid("the model has no tokenizer.json: give lists of token ids")
    return engine.tokenizer.encode_all([(query, document)], limit=engine.plan.max_model_len)[0]
