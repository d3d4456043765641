"""Loading and unloading adapters over HTTP, in vLLM's format. Off unless the engine has an ``adapter_root``,
and then confined to it."""

from __future__ import annotations

from aioengine.adapters.names import NAME_RULE, NAME_RULE_TEXT
from aioengine.adapters.resolvers.base import within
from aioengine.errors import AdapterConflict, AdapterError, AdapterNotFound
from aioengine.server.adapter_root import AdapterRoot
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, to_api_error, without_places
from aioengine.server.openai.api import Strict

MAX_ADAPTERS = 10_000
"""Number of adapters from which on no further ones are loaded over HTTP: they take memory, and each list of
them takes time."""


class LoadRequest(Strict, kw_only=True):
    lora_name: str | None = None
    """The adapter's name in requests."""
    lora_path: str | None = None
    """Its folder, relative to the server's adapter root or absolute within it. The key must be allowed to use
    the adapter that is found there by its name."""
    load_inplace: bool | None = None
    """Replace the adapter of this name; requests that were accepted before finish on the old version."""


class UnloadRequest(Strict, kw_only=True):
    lora_name: str | None = None
    lora_int_id: int | None = None
    """Ignored."""


async def load(call: Call, data: LoadRequest) -> str:
    """Load an adapter."""
    root, name, path = _root(call), data.lora_name, data.lora_path
    replace = bool(data.load_inplace)
    if not name or not path:
        raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.")
    check_may_load(call, name, replace=replace)
    try:
        below = root.below(name, path)
        if not call.record.identity.models.allow(below):
            raise _not_allowed(f"from {path[:300]!r}", "lora_path")
        folder = await within(root.timeout, name, root.find(name, below))
    except AdapterNotFound as error:
        text = f"no adapter found for {path[:300]}: {without_places(error.reason)}"
        raise _not_found(f"Loading lora {name} failed: {text}", "lora_path") from error
    try:
        await call.context.engine.load_adapter(name, folder, replace=replace)
    except AdapterError as error:
        api_error = load_error(call, error, replace=replace)
        if api_error.detail.param != "lora_name":
            api_error.detail.param = "lora_path"
        raise api_error from error
    return f"Success: LoRA adapter '{name}' added successfully."


async def unload(call: Call, data: UnloadRequest) -> str:
    """Unload an adapter, when the requests that use it have ended."""
    _root(call)
    name = data.lora_name
    if not name:
        raise ApiError(400, "'lora_name' must be provided.", param="lora_name")
    try:
        if not call.record.identity.models.allow(name):
            raise AdapterNotFound("it is not among those that the key may use", name=name)
        await call.context.engine.unload_adapter(name)
    except AdapterNotFound as error:
        raise _not_found(f"The lora adapter '{name}' cannot be found.", "lora_name") from error
    return f"Success: LoRA adapter '{name}' removed successfully."


def check_may_load(call: Call, name: str, *, replace: bool) -> None:
    """Raise ApiError if no adapter can have this name, if the request's key may not load one of it, if there
    is one that it does not ``replace``, or if there are too many others."""
    engine = call.context.engine
    if NAME_RULE.fullmatch(name) is None or name in call.context.model_names:
        text = f"lora_name: {name[:300]!r} is the base model's name, or not {NAME_RULE_TEXT}"
        raise ApiError(400, text, param="lora_name")
    if not call.record.identity.models.allow(name):
        raise _not_allowed(f"that is called {name!r}", "lora_name")
    is_known = engine.find_adapter(name) is not None
    if is_known and not replace:
        raise _already_loaded(name)
    if not is_known and (count := engine.count_adapters()) >= MAX_ADAPTERS:
        text = f"there are {count} adapters, which is the maximum; unload some first"
        raise ApiError(400, text, param="lora_name", code="too_many_adapters")


def load_error(call: Call, error: AdapterError, *, replace: bool) -> ApiError:
    """Convert an error of loading an adapter that was not there when :func:`check_may_load` looked. The
    message does not say where another request has loaded it from meanwhile."""
    is_there = call.context.engine.find_adapter(error.name) is not None
    if isinstance(error, AdapterConflict) and not replace and is_there:
        return _already_loaded(error.name)
    return to_api_error(error, call.context.settings)


def _root(call: Call) -> AdapterRoot:
    root = call.context.adapter_root
    if root is None:
        why = "the server was started without an adapter root"
        text = f"adapters cannot be loaded or unloaded over HTTP: {why}"
        raise ApiError(403, text, code="adapter_loading_disabled")
    return root


def _already_loaded(name: str) -> ApiError:
    return ApiError(400, f"The lora adapter '{name}' has already been loaded.", param="lora_name")


def _not_found(text: str, param: str) -> ApiError:
    return ApiError(404, text, param=param, code="adapter_not_found")


def _not_allowed(what: str, param: str) -> ApiError:
    text = f"this API key may not load an adapter {what}"
    return ApiError(403, text, param=param, code="adapter_not_allowed")
