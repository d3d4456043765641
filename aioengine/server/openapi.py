"""The API's description: ``/docs/openapi.json`` for programs, ``/docs`` for people.

The page is plain HTML that is made here: the usual viewers load their scripts from other sites.
"""

from __future__ import annotations

import http
import inspect
import re
from collections.abc import Iterable
from html import escape
from typing import Any

import msgspec

from aioengine import __version__
from aioengine.server import reports
from aioengine.server.errors import ErrorBody
from aioengine.server.routes import ADMIN, METRICS, Route

_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def make_documents(routes: Iterable[Route], *, with_keys: bool) -> tuple[bytes, bytes]:
    """Make the document and the page. ``with_keys``: requests must carry an API key."""
    hidden = (reports.docs, reports.openapi)
    schema = _describe([r for r in routes if r.scopes not in (ADMIN, METRICS) and r.function not in hidden])
    if with_keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return msgspec.json.encode(schema), _page(schema).encode()


def _describe(routes: list[Route]) -> dict[str, Any]:
    """Return the OpenAPI document, with msgspec's schemas of the types, which have every bound."""
    types = [route.type_of("return") for route in routes] + [route.type_of("data") or str for route in routes]
    [error, *schemas], components = msgspec.json.schema_components(
        [ErrorBody, *types], ref_template="#/components/schemas/{name}"
    )
    errors = {
        str(status): {"description": http.HTTPStatus(status).phrase, "content": _json(error)}
        for status in _STATUSES
    }
    paths: dict[str, Any] = {}
    for i, route in enumerate(routes):
        gives, takes = schemas[i], schemas[len(routes) + i]
        summary, _, more = (inspect.getdoc(route.function) or "").partition("\n\n")
        content = {"text/plain": {"schema": gives}} if types[i] is str else _json(gives)
        if "stream" in getattr(types[len(routes) + i], "__struct_fields__", ()):
            content["text/event-stream"] = {"schema": {"type": "string"}}
        names = re.findall(r"{(\w+)}", route.path)
        text = {"type": "string"}
        parameters = [{"name": name, "in": "path", "required": True, "schema": text} for name in names]
        query = route.type_of("query")
        if query is not None:
            known = msgspec.json.schema(query)["$defs"][query.__name__]["properties"]
            parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in known.items()]
        operation: dict[str, Any] = {
            "summary": " ".join(summary.split()).removesuffix("."),
            "operationId": re.sub(r"\W+", "_", f"{route.method} {route.path}").strip("_"),
            "responses": {"200": {"description": "The answer", "content": content}, **errors},
            "parameters": parameters,
        }
        if more:
            operation["description"] = more
        if types[len(routes) + i] is not str:
            operation["requestBody"] = {"required": True, "content": _json(takes)}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    about = "OpenAI-compatible text generation, with LoRA adapters as models."
    return {
        "openapi": "3.1.0",
        "info": {"title": "aioengine", "version": __version__, "description": about},
        "servers": [{"url": ".."}],  # relative to the document: right under any mount point
        "paths": paths,
        "components": {"schemas": components},
    }


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _page(schema: dict[str, Any]) -> str:
    """Return the page: the routes, and each type as JSON Schema."""
    info = schema["info"]
    title = f"{info['title']} {info['version']}"
    routes = "".join(
        f"<li><code>{method.upper()} {escape(path)}</code> {escape(operation['summary'])}</li>"
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    )
    types = "".join(
        f"<details><summary><code>{escape(name)}</code></summary><pre>{_shown(component)}</pre></details>"
        for name, component in schema["components"]["schemas"].items()
    )
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<style>:root { color-scheme: light dark; } body { font-family: sans-serif; }</style></head>"
        f"<body><h1>{title}</h1><p>{info['description']} <a href='docs/openapi.json'>openapi.json</a></p>"
        f"<ul>{routes}</ul><h2>Types</h2>{types}</body></html>"
    )


def _shown(component: dict[str, Any]) -> str:
    return escape(msgspec.json.format(msgspec.json.encode(component), indent=2).decode())
