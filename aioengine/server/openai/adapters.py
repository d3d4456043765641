"""Loading and unloading adapters over HTTP, in vLLM's format. Off unless the engine has an ``adapter_root``,
and then confined to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
from litestar import MediaType, Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody

from aioengine import FilesystemResolver
from aioengine.adapters.names import NAME_RULE, NAME_RULE_TEXT
from aioengine.adapters.resolvers.base import within
from aioengine.adapters.resolvers.sources import source_below
from aioengine.errors import AdapterConflict, AdapterError, AdapterNotFound
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, to_api_error, without_places
from aioengine.server.framework import RESPONSES, record_of

MAX_ADAPTERS = 10_000
"""Number of adapters from which on no further ones are loaded over HTTP: they take memory, and each list of
them takes time."""


class LoadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    lora_name: str | None = None
    """The adapter's name in requests."""
    lora_path: str | None = None
    """Its folder, relative to the server's adapter root or absolute within it. The key must be allowed to use
    the adapter that is found there by its name."""
    load_inplace: bool | None = None
    """Replace the adapter of this name; requests that were accepted before finish on the old version."""


class UnloadRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    lora_name: str | None = None
    lora_int_id: int | None = None
    """Ignored."""


def check_may_load(context: Context, request: Request[Any, Any, Any], name: str, *, replace: bool) -> None:
    """Raise ApiError if the request's key may not load an adapter of this name, if there is one that it does
    not ``replace``, or if there are too many others."""
    if not record_of(request).identity.models.allow(name):
        raise _not_allowed(f"that is called {name!r}", "lora_name")
    is_known = context.engine.find_adapter(name) is not None
    if is_known and not replace:
        raise _already_loaded(name)
    if not is_known and (count := context.engine.count_adapters()) >= MAX_ADAPTERS:
        text = f"there are {count} adapters, which is the maximum; unload some first"
        raise ApiError(400, text, param="lora_name", code="too_many_adapters")


def load_error(context: Context, error: AdapterError, *, replace: bool) -> ApiError:
    """Convert an error of loading an adapter that was not there when :func:`check_may_load` looked. The
    message does not say where another request has loaded it from meanwhile."""
    if (
        isinstance(error, AdapterConflict)
        and not replace
        and context.engine.find_adapter(error.name) is not None
    ):
        return _already_loaded(error.name)
    return to_api_error(error, context.settings)


def _already_loaded(name: str) -> ApiError:
    return ApiError(400, f"The lora adapter '{name}' has already been loaded.", param="lora_name")


def adapter_routes(context: Context) -> list[HTTPRouteHandler]:
    lora = context.engine.config.lora
    root = None if lora is None else lora.adapter_root
    where = None if root is None else _Root(root)
    timeout = None if lora is None else lora.load_timeout

    @post(
        "/v1/load_lora_adapter",
        status_code=200,
        media_type=MediaType.TEXT,
        responses=RESPONSES,
        summary="Load an adapter",
    )
    async def load(data: JSONBody[LoadRequest], request: Request[Any, Any, Any]) -> str:
        allowed = _allowed(where)
        name, path = data.lora_name, data.lora_path
        if not name or not path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if NAME_RULE.fullmatch(name) is None:
            raise ApiError(400, f"lora_name: {name[:300]!r} is not {NAME_RULE_TEXT}", param="lora_name")
        if name in context.model_names:
            raise ApiError(400, f"{name!r} is the base model's name", param="lora_name")
        check_may_load(context, request, name, replace=bool(data.load_inplace))
        try:
            below = allowed.below(name, path)
            if not record_of(request).identity.models.allow(below):
                raise _not_allowed(f"from {path[:300]!r}", "lora_path")
            folder = await within(timeout, name, allowed.find(name, below))
        except AdapterNotFound as error:
            reason = without_places(error.reason)
            raise ApiError(
                404,
                f"Loading lora {name} failed: no adapter found for {path[:300]}: {reason}",
                param="lora_path",
                code="adapter_not_found",
            ) from error
        try:
            await context.engine.load_adapter(name, folder, replace=bool(data.load_inplace))
        except AdapterError as error:
            api_error = load_error(context, error, replace=bool(data.load_inplace))
            if api_error.detail.param != "lora_name":
                api_error.detail.param = "lora_path"
            raise api_error from error
        return f"Success: LoRA adapter '{name}' added successfully."

    @post(
        "/v1/unload_lora_adapter",
        status_code=200,
        media_type=MediaType.TEXT,
        responses=RESPONSES,
        summary="Unload an adapter, when the requests that use it have ended",
    )
    async def unload(data: JSONBody[UnloadRequest], request: Request[Any, Any, Any]) -> str:
        _allowed(where)
        name = data.lora_name
        if not name:
            raise ApiError(400, "'lora_name' must be provided.", param="lora_name")
        try:
            if not record_of(request).identity.models.allow(name):
                raise AdapterNotFound("it is not among those that the key may use", name=name)
            await context.engine.unload_adapter(name)
        except AdapterNotFound as error:
            raise ApiError(
                404,
                f"The lora adapter '{name}' cannot be found.",
                param="lora_name",
                code="adapter_not_found",
            ) from error
        return f"Success: LoRA adapter '{name}' removed successfully."

    return [load, unload]


class _Root:
    """The place below which adapters may be loaded from: a folder, or a URL."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._folders = None if source_below(root, "", "any") is not None else FilesystemResolver(root)

    def below(self, name: str, path: str) -> str:
        """Return the path relative to the root. Raises AdapterNotFound if it is not below a URL; ``find``
        says whether it is below a folder."""
        if self._folders is None:
            return str(source_below(self._root, name, path)).removeprefix(self._root.rstrip("/") + "/")
        return _relative(path, self._folders.root)

    async def find(self, name: str, below: str) -> str:
        """Return the folder or the URL. Raises AdapterNotFound if it is not below the root."""
        if self._folders is None:
            return str(source_below(self._root, name, below))
        return str(await self._folders.resolve(below))


def _not_allowed(what: str, param: str) -> ApiError:
    text = f"this API key may not load an adapter {what}"
    return ApiError(403, text, type="permission_error", param=param, code="adapter_not_allowed")


def _allowed(root: _Root | None) -> _Root:
    if root is None:
        text = (
            "adapters cannot be loaded or unloaded over HTTP: the server was started without an adapter root"
        )
        raise ApiError(403, text, type="permission_error", code="adapter_loading_disabled")
    return root


def _relative(path: str, root: Path) -> str:
    """Return the path relative to ``root``. A path outside gets ".." parts, which the resolver refuses."""
    return os.path.relpath(path, root) if os.path.isabs(path) else path.removeprefix("./").rstrip("/")
