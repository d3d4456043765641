"""The table of routes, and which scopes a key needs for each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, get_args, get_type_hints

from aioengine.server import reports
from aioengine.server.access.keys import SCOPES, Scope
from aioengine.server.messages import routes as messages
from aioengine.server.openai import adapters, chat, completions, tokens, uploads
from aioengine.server.responses import routes as responses
from aioengine.server.vectors import routes as vectors

OPEN: tuple[Scope, ...] = ()
GENERATE: tuple[Scope, ...] = ("generate",)
MODELS: tuple[Scope, ...] = ("generate", "adapters")
ADAPTERS: tuple[Scope, ...] = ("adapters",)
ADMIN: tuple[Scope, ...] = ("admin",)
METRICS: tuple[Scope, ...] = ("metrics",)


class Route(NamedTuple):
    """A route. Its description is that of its function: the beginning of the docstring, and the types."""

    method: str
    path: str
    function: Callable[..., Awaitable[Any]]
    """Takes a Call and, if they are to be decoded, the body as ``data`` and the query as ``query``."""
    scopes: tuple[Scope, ...]
    """A key needs one of them ("admin" includes all); empty if no key is required."""

    @property
    def takes(self) -> Any:
        """Type of the body; None if it is not decoded."""
        return get_type_hints(self.function).get("data")

    @property
    def query(self) -> Any:
        """Type of the query; None if it is not decoded."""
        return get_type_hints(self.function).get("query")

    @property
    def gives(self) -> Any:
        """Type of the answer's JSON; ``str`` for a text."""
        given = get_type_hints(self.function, include_extras=True)["return"]
        return get_args(given)[-1] if get_args(given) else given


ROUTES = (
    Route("POST", "/v1/chat/completions", chat.chat_completions, GENERATE),
    Route("POST", "/v1/completions", completions.completions, GENERATE),
    Route("POST", "/v1/responses", responses.responses, GENERATE),
    Route("POST", "/v1/messages", messages.messages, GENERATE),
    Route("GET", "/health", reports.health, OPEN),
    Route("GET", "/ready", reports.ready, OPEN),
    Route("POST", "/v1/messages/count_tokens", messages.count_tokens, GENERATE),
    Route("POST", "/v1/embeddings", vectors.embeddings, GENERATE),
    Route("POST", "/pooling", vectors.pooling, GENERATE),
    Route("POST", "/classify", vectors.classify, GENERATE),
    Route("POST", "/score", vectors.score, GENERATE),
    Route("POST", "/v1/score", vectors.score, GENERATE),
    Route("POST", "/rerank", vectors.rerank, GENERATE),
    Route("POST", "/v1/rerank", vectors.rerank, GENERATE),
    Route("POST", "/v2/rerank", vectors.rerank, GENERATE),
    Route("POST", "/tokenize", tokens.tokenize, GENERATE),
    Route("POST", "/detokenize", tokens.detokenize, GENERATE),
    Route("GET", "/tokenizer_info", tokens.tokenizer_info, GENERATE),
    Route("GET", "/v1/models", reports.models, MODELS),
    Route("GET", "/v1/models/{model}", reports.model, MODELS),
    Route("POST", "/v1/load_lora_adapter", adapters.load, ADAPTERS),
    Route("POST", "/v1/unload_lora_adapter", adapters.unload, ADAPTERS),
    Route("POST", "/v1/upload_lora_adapter", uploads.upload, ADAPTERS),
    Route("GET", "/version", reports.version, SCOPES),
    Route("GET", "/debug/requests", reports.debug_requests, ADMIN),
    Route("GET", "/debug/adapters", reports.debug_adapters, ADMIN),
    Route("GET", "/debug/stacks", reports.debug_stacks, ADMIN),
    Route("GET", "/docs", reports.docs, SCOPES),
    Route("GET", "/docs/openapi.json", reports.openapi, SCOPES),
    Route("GET", "/", reports.page, METRICS),
    Route("GET", "/metrics", reports.page, METRICS),
    Route("GET", "/metrics/targets", reports.page, METRICS),
    Route("GET", "/events", reports.page, METRICS),
    Route("GET", "/assets/{file}", reports.page, METRICS),
)
"""In the order in which they are looked for: those that get many requests come first."""
