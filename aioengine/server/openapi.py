"""The API's description: ``/docs/openapi.json`` for programs, ``/docs`` for people.

The page is plain HTML that is made here: the usual viewers load their scripts from other sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import msgspec
from litestar import Litestar, Request
from litestar._openapi.plugin import OpenAPIPlugin
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Server

from aioengine.server.errors import ErrorBody
from aioengine.server.health import Health
from aioengine.server.messages.api import CountRequest, MessagesRequest
from aioengine.server.messages.routes import Counted
from aioengine.server.openai.adapters import LoadRequest, UnloadRequest
from aioengine.server.openai.chat_api import ChatCompletion, ChatRequest
from aioengine.server.openai.completions_api import Completion, CompletionRequest
from aioengine.server.openai.models import ModelList
from aioengine.server.openai.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from aioengine.server.openai.uploads import Uploaded
from aioengine.server.responses.api import ResponsesRequest
from aioengine.server.vectors import api as vectors

_TYPES = (
    ChatCompletion,
    ChatRequest,
    vectors.ClassifyRequest,
    CountRequest,
    Counted,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    Detokenized,
    vectors.EmbeddingRequest,
    ErrorBody,
    Health,
    LoadRequest,
    MessagesRequest,
    ModelList,
    vectors.PoolingRequest,
    vectors.Ranked,
    vectors.RerankRequest,
    ResponsesRequest,
    vectors.ScoreRequest,
    TokenizeRequest,
    Tokenized,
    UnloadRequest,
    Uploaded,
    vectors.ScoreList,
    vectors.PoolingList,
    vectors.EmbeddingList,
    vectors.ClassList,
)
_STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
th, td { border-bottom: 1px solid #8884; }
code { font: 13px ui-monospace, monospace; }
h2 code { font-size: 1rem; }
"""


def openapi_config(version: str, *, with_keys: bool) -> OpenAPIConfig:
    """Return Litestar's configuration. ``with_keys``: requests must carry an API key."""
    components = Components()
    if with_keys:
        components = Components(security_schemes={"key": SecurityScheme(type="http", scheme="bearer")})
    return OpenAPIConfig(
        title="aioengine",
        version=version,
        description="OpenAI-compatible text generation, with LoRA adapters as models.",
        path="/docs",
        render_plugins=[HtmlPlugin(path="/"), JsonPlugin(path="/openapi.json")],
        servers=[Server(url="..")],  # relative to the document: right under any mount point
        components=components,
        security=[{"key": []}] if with_keys else None,
    )


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """Add msgspec's schemas of the types, which have every bound, and the streamed answers."""
    _, types = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    paths = {path: dict(operations) for path, operations in schema["paths"].items()}
    for path in _STREAMED:
        post = paths[path]["post"] = dict(paths[path]["post"])
        ok = post["responses"]["200"]
        events = {"text/event-stream": {"schema": {"type": "string"}}}
        post["responses"] = {
            **post["responses"],
            "200": {**ok, "description": "The answer", "content": {**ok["content"], **events}},
        }
    components = schema.get("components", {})
    schemas = {**components.get("schemas", {}), **types}
    return {**schema, "paths": paths, "components": {**components, "schemas": schemas}}


def make_documents(routes: Litestar) -> None:
    """Make the documents, which are then kept. Takes a third of a second, so not on the event loop."""
    schema = routes.plugins.get(OpenAPIPlugin).provide_openapi_schema()
    for plugin in routes.openapi_config.render_plugins if routes.openapi_config else ():
        if isinstance(plugin, _Made):
            plugin.make(schema)


class _Made(OpenAPIRenderPlugin):
    """Makes its document once."""

    _document: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        return self._document or self.make(openapi_schema)

    def make(self, openapi_schema: dict[str, Any]) -> bytes:
        self._document = self._make(complete(openapi_schema))
        return self._document

    def _make(self, schema: dict[str, Any]) -> bytes:
        raise NotImplementedError


class JsonPlugin(_Made, JsonRenderPlugin):
    def _make(self, schema: dict[str, Any]) -> bytes:
        return msgspec.json.encode(schema)


class HtmlPlugin(_Made):
    def _make(self, schema: dict[str, Any]) -> bytes:
        return "\n".join(_page(schema)).encode()


def _page(schema: dict[str, Any]) -> Iterator[str]:
    info = schema["info"]
    title = f"{escape(info['title'])} {escape(info['version'])}"
    yield f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
    yield f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
    yield f"<p>{escape(info.get('description', ''))} <a href='docs/openapi.json'>openapi.json</a></p>"
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('summary', ''))}</p>"
            content = operation.get("requestBody", {}).get("content", {})
            for kind in content.values():
                yield f"<p>Takes {_type(kind['schema'])}.</p>"
            yield "<table><tr><th>status</th><th>answer</th><th></th></tr>"
            for status, response in operation.get("responses", {}).items():
                kinds = [_type(k["schema"]) for k in response.get("content", {}).values() if "schema" in k]
                about = escape(response.get("description", ""))
                yield f"<tr><td>{escape(status)}</td><td>{', '.join(kinds)}</td><td>{about}</td></tr>"
            yield "</table>"
    yield "<h1>Types</h1>"
    for name, component in schema.get("components", {}).get("schemas", {}).items():
        yield f"<h2 id='{escape(name)}'><code>{escape(name)}</code></h2>"
        yield "<table><tr><th>field</th><th>type</th><th></th></tr>"
        required = component.get("required", [])
        for field, kind in component.get("properties", {}).items():
            need = "required" if field in required else ""
            yield f"<tr><td><code>{escape(field)}</code></td><td>{_type(kind)}</td><td>{need}</td></tr>"
        yield "</table>"
    yield "</body></html>"


def _type(schema: dict[str, Any]) -> str:
    """Return a schema in a few words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    for key in ("oneOf", "anyOf", "allOf"):
        if key in schema:
            return " | ".join(map(_type, schema[key]))
    if "const" in schema:
        return f"<code>{escape(repr(schema['const']))}</code>"
    if "enum" in schema:
        return " | ".join(f"<code>{escape(repr(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "any")
    text = escape(" | ".join(kind) if isinstance(kind, list) else kind)
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", "&ge;"),
            ("exclusiveMinimum", "&gt;"),
            ("maximum", "&le;"),
            ("exclusiveMaximum", "&lt;"),
        )
        if schema.get(key) is not None
    ]
    return " ".join([text, ", ".join(bounds)]).strip()
