"""The API's description: ``/docs/openapi.json`` for programs, ``/docs`` for people.

The page is plain HTML that is made here: the usual viewers load their scripts from other sites.
"""

from __future__ import annotations

import http
import inspect
import re
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

import msgspec

from aioengine import __version__
from aioengine.server import reports
from aioengine.server.context import Documents
from aioengine.server.errors import ErrorBody
from aioengine.server.routes import ADMIN, METRICS, Route

_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
th, td { border-bottom: 1px solid #8884; }
code { font: 13px ui-monospace, monospace; }
h2 code { font-size: 1rem; }
"""


def make_documents(routes: Iterable[Route], *, with_keys: bool) -> Documents:
    """Make the documents. ``with_keys``: requests must carry an API key."""
    hidden = (reports.docs, reports.openapi)
    schema = _describe([r for r in routes if r.scopes not in (ADMIN, METRICS) and r.function not in hidden])
    if with_keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
    return Documents(msgspec.json.encode(schema), "\n".join(_page(schema)).encode())


def _describe(routes: list[Route]) -> dict[str, Any]:
    """Return the OpenAPI document, with msgspec's schemas of the types, which have every bound."""
    types = [*(route.gives for route in routes), ErrorBody, *(route.takes or str for route in routes)]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    gives, error, takes = schemas[: len(routes)], schemas[len(routes)], schemas[len(routes) + 1 :]
    errors = {
        str(status): {"description": http.HTTPStatus(status).phrase, "content": _json(error)}
        for status in _STATUSES
    }
    paths: dict[str, Any] = {}
    for route, given, taken in zip(routes, gives, takes, strict=True):
        summary, _, more = (inspect.getdoc(route.function) or "").partition("\n\n")
        content = {"text/plain": {"schema": given}} if route.gives is str else _json(given)
        if "stream" in getattr(route.takes, "__struct_fields__", ()):
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation: dict[str, Any] = {
            "summary": " ".join(summary.split()).removesuffix("."),
            "operationId": re.sub(r"\W+", "_", f"{route.method} {route.path}").strip("_"),
            "responses": {"200": {"description": "The answer", "content": content}, **errors},
        }
        if more:
            operation["description"] = more
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in re.findall(r"{(\w+)}", route.path)
        ]
        if route.query is not None:
            known = msgspec.json.schema(route.query)["$defs"][route.query.__name__]["properties"]
            operation["parameters"] += [{"name": n, "in": "query", "schema": s} for n, s in known.items()]
        if route.takes is not None:
            operation["requestBody"] = {"required": True, "content": _json(taken)}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "aioengine",
            "version": __version__,
            "description": "OpenAI-compatible text generation, with LoRA adapters as models.",
        },
        "servers": [{"url": ".."}],  # relative to the document: right under any mount point
        "paths": paths,
        "components": {"schemas": components},
    }


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _page(schema: dict[str, Any]) -> Iterator[str]:
    title = f"{schema['info']['title']} {schema['info']['version']}"
    yield f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
    yield f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
    yield f"<p>{schema['info']['description']} <a href='docs/openapi.json'>openapi.json</a></p>"
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation['summary'])}</p>"
            taken = operation.get("requestBody", {}).get("content", {}).values()
            yield "".join(f"<p>Takes {_type(kind['schema'])}.</p>" for kind in taken)
            given = operation["responses"]["200"]["content"].values()
            yield f"<p>Gives {' or '.join(_type(kind['schema']) for kind in given)}.</p>"
    for name, component in schema["components"]["schemas"].items():
        yield f"<h2 id='{escape(name)}'><code>{escape(name)}</code></h2><table>"
        for field, kind in component.get("properties", {}).items():
            need = "required" if field in component.get("required", ()) else ""
            yield f"<tr><td><code>{escape(field)}</code></td><td>{_type(kind)}</td><td>{need}</td></tr>"
        yield "</table>"
    yield "</body></html>"


def _type(schema: dict[str, Any]) -> str:
    """Return a schema in a few words, as HTML; its bounds are in the JSON."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    if "anyOf" in schema:
        return " | ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " | ".join(f"<code>{escape(repr(value))}</code>" for value in schema["enum"])
    kind = str(schema.get("type", "any"))
    return f"list of {_type(schema.get('items', {}))}" if kind == "array" else escape(kind)
