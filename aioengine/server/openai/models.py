"""``/v1/models``: what ``model`` may be in a request."""

from __future__ import annotations

from typing import Literal

import msgspec
from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from aioengine.info import AdapterInfo
from aioengine.server.context import Context
from aioengine.server.errors import model_not_found
from aioengine.server.framework import RESPONSES


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970."""
    owned_by: str = "aioengine"
    root: str
    """Where it was loaded from."""
    parent: str | None = None
    """An adapter's base model."""
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def model_routes(context: Context) -> list[HTTPRouteHandler]:
    def base(name: str) -> ModelCard:
        engine = context.engine
        return ModelCard(
            id=name,
            created=context.created,
            root=engine.config.model,
            max_model_len=engine.plan.max_model_len,
        )

    def adapter(info: AdapterInfo) -> ModelCard:
        card = base(info.name)
        card.root, card.parent = info.path, context.model_names[0]
        return card

    def cards() -> list[ModelCard]:
        return [*map(base, context.model_names), *map(adapter, context.engine.adapters())]

    @get("/v1/models", responses=RESPONSES, summary="The base model and the adapters", sync_to_thread=False)
    def models() -> ModelList:
        return ModelList(data=cards())

    @get("/v1/models/{model:path}", responses=RESPONSES, summary="One of them", sync_to_thread=False)
    def model(model: FromPath[str]) -> ModelCard:
        name = model.removeprefix("/")
        for card in cards():
            if card.id == name:
                return card
        raise model_not_found(name)

    return [models, model]
