"""The API's description, ``/docs/openapi.json``."""

from __future__ import annotations

import http
import inspect
import re
from collections.abc import Iterable
from typing import Any

import msgspec

from aioengine import __version__
from aioengine.server import reports
from aioengine.server.errors import ErrorBody
from aioengine.server.routes import ADMIN, METRICS, Route

_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def make_document(routes: Iterable[Route], *, with_keys: bool) -> bytes:
    """Make the OpenAPI document, with msgspec's schemas of the types, which have every bound. ``with_keys``:
    requests must carry an API key."""
    shown = [r for r in routes if r.scopes not in (ADMIN, METRICS) and r.function is not reports.openapi]
    types = [route.type_of("return") for route in shown] + [route.type_of("data") or str for route in shown]
    [error, *schemas], components = msgspec.json.schema_components(
        [ErrorBody, *types], ref_template="#/components/schemas/{name}"
    )
    errors = {
        str(status): {"description": http.HTTPStatus(status).phrase, "content": _json(error)}
        for status in _STATUSES
    }
    paths: dict[str, Any] = {}
    for i, route in enumerate(shown):
        taken = types[len(shown) + i]
        content = {"text/plain": {"schema": schemas[i]}} if types[i] is str else _json(schemas[i])
        if "stream" in getattr(taken, "__struct_fields__", ()):
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation: dict[str, Any] = {
            "summary": inspect.getdoc(route.function),
            "operationId": re.sub(r"\W+", "_", f"{route.method} {route.path}").strip("_"),
            "responses": {"200": {"description": "The answer", "content": content}, **errors},
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"{(\w+)}", route.path)
            ],
        }
        if taken is not str:
            operation["requestBody"] = {"required": True, "content": _json(schemas[len(shown) + i])}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "aioengine", "version": __version__},
        "servers": [{"url": ".."}],  # relative to the document: right under any mount point
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return msgspec.json.encode(document)


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
