"""``/v1/models``: what ``model`` may be in a request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec
from litestar import Request, get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response import Response

from aioengine.info import AdapterInfo
from aioengine.server.access.auth import Identity
from aioengine.server.context import Context
from aioengine.server.errors import model_not_found
from aioengine.server.framework import RESPONSES, listing, record_of


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970."""
    owned_by: str = "aioengine"
    root: str
    """Name; for keys with the scope "admin" the place that it was loaded from."""
    parent: str | None = None
    """An adapter's base model."""
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def model_routes(context: Context) -> list[HTTPRouteHandler]:
    def cards(identity: Identity, adapters: Iterable[AdapterInfo]) -> Iterator[ModelCard]:
        """Return the names of the base model, and those of ``adapters`` that ``identity`` may use."""
        engine = context.engine
        shows_paths = identity.may("admin")

        def card(name: str, path: str, parent: str | None) -> ModelCard:
            return ModelCard(
                id=name,
                created=context.created,
                root=path if shows_paths else name,
                parent=parent,
                max_model_len=engine.plan.max_model_len,
            )

        if identity.models.allow(None):
            yield from (card(name, engine.config.model, None) for name in context.model_names)
        for info in adapters:
            if identity.models.allow(info.name):
                yield card(info.name, info.path, context.model_names[0])

    @get("/v1/models", responses=RESPONSES, summary="The base model and the adapters")
    async def models(request: Request[Any, Any, Any]) -> Response[ModelList]:
        record, adapters = record_of(request), context.engine.adapters()
        return await listing(
            context, record, adapters, lambda: ModelList(data=list(cards(record.identity, adapters)))
        )

    @get("/v1/models/{model:path}", responses=RESPONSES, summary="One of them", sync_to_thread=False)
    def model(model: FromPath[str], request: Request[Any, Any, Any]) -> ModelCard:
        name = model.removeprefix("/")
        found = context.engine.find_adapter(name)
        for card in cards(record_of(request).identity, () if found is None else (found,)):
            if card.id == name:
                return card
        raise model_not_found(name)

    return [models, model]
