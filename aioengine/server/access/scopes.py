"""Table of the scope that each route requires."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aioengine.server.access.keys import SCOPES, Scope

_ANY: tuple[Scope, ...] = SCOPES
_OPEN: tuple[Scope, ...] = ()
_GENERATE: tuple[Scope, ...] = ("generate",)
_ADAPTERS: tuple[Scope, ...] = ("adapters",)
_ADMIN: tuple[Scope, ...] = ("admin",)
_METRICS: tuple[Scope, ...] = ("metrics",)

PAGE_ROUTE = "/metrics"
"""The row for all routes of the metrics application, including the live page."""

ROUTES: Mapping[str, tuple[Scope, ...]] = {
    "/health": _OPEN,
    "/ready": _OPEN,
    PAGE_ROUTE: _METRICS,
    "/v1/chat/completions": _GENERATE,
    "/v1/completions": _GENERATE,
    "/v1/responses": _GENERATE,
    "/v1/messages": _GENERATE,
    "/v1/messages/count_tokens": _GENERATE,
    "/v1/embeddings": _GENERATE,
    "/pooling": _GENERATE,
    "/classify": _GENERATE,
    "/score": _GENERATE,
    "/v1/score": _GENERATE,
    "/rerank": _GENERATE,
    "/v1/rerank": _GENERATE,
    "/v2/rerank": _GENERATE,
    "/tokenize": _GENERATE,
    "/detokenize": _GENERATE,
    "/tokenizer_info": _GENERATE,
    "/v1/models": ("generate", "adapters"),
    "/v1/models/{model}": ("generate", "adapters"),
    "/v1/load_lora_adapter": _ADAPTERS,
    "/v1/unload_lora_adapter": _ADAPTERS,
    "/v1/upload_lora_adapter": _ADAPTERS,
    "/debug/requests": _ADMIN,
    "/debug/adapters": _ADMIN,
    "/debug/stacks": _ADMIN,
    "/version": _ANY,
    "/docs": _ANY,
    "/docs/openapi.json": _ANY,
    "/docs/{path}": _ANY,
}
"""Route -> scopes, of which a key needs one ("admin" includes all); empty if no key is required."""

LIMITED = frozenset(route for route, scopes in ROUTES.items() if scopes == _GENERATE)
"""The routes that count against a key's limits."""


def check_routes(routes: Iterable[str]) -> None:
    """Raise RuntimeError for a route that is missing in the table."""
    missing = sorted(set(routes) - ROUTES.keys())
    if missing:
        raise RuntimeError(f"no scope is given for {', '.join(missing)}: add it to {__name__}.ROUTES")
