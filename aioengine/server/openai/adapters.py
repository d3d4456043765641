"""Loading, uploading and unloading adapters over HTTP, in vLLM's format.

Loading is off unless the engine has an ``adapter_root``, and then confined to it; uploading unless the server
has ``max_upload_bytes``. Nothing of an upload is written to disk.
"""

from __future__ import annotations

import os
import posixpath
from io import BytesIO
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from multipart import MultipartParser, parse_options_header
from starlette.datastructures import QueryParams

from aioengine.adapters.read_threads import start_read
from aioengine.adapters.resolvers.base import within
from aioengine.adapters.resolvers.sources import NAME_RULE, NAME_RULE_TEXT, source_below
from aioengine.errors import AdapterNotFound
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, without_places
from aioengine.server.openai.api import IGNORED, Ignored, Strict
from aioengine.server.transport.body import BoundedBody

MAX_ADAPTERS = 10_000
"""Number of adapters from which on no further ones are loaded over HTTP: they take memory, and each list of
them takes time."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 256 << 10
Text = Annotated[str, Meta(min_length=1)]


class LoadRequest(Strict, kw_only=True):
    lora_name: Text
    """The adapter's name in requests."""
    lora_path: Text
    """Its folder, relative to the server's adapter root or absolute within it. The key must be allowed to use
    the adapter that is found there by its name."""
    load_inplace: bool | None = None
    """Replace the adapter of this name; requests that were accepted before finish on the old version."""


class UnloadRequest(Strict, kw_only=True):
    lora_name: Text
    lora_int_id: Ignored = IGNORED


class Uploaded(msgspec.Struct, kw_only=True):
    """The adapter as it was loaded."""

    name: str
    version: int
    digest: str
    """SHA-256 of its two files, one after the other."""
    rank: int
    bytes: int


async def load(call: Call, data: LoadRequest) -> str:
    """Load an adapter."""
    root, name, path = _root(call), data.lora_name, data.lora_path
    replace = bool(data.load_inplace)
    _check_may_load(call, name, replace=replace)
    try:
        folder = await _place(call, root, name, path)
    except AdapterNotFound as error:
        text = f"no adapter found for {path[:300]}: {without_places(error.reason)}"
        raise _not_found(f"Loading lora {name} failed: {text}", "lora_path") from error
    call.record.named_in = "lora_path"
    await call.context.engine.load_adapter(name, folder, replace=replace)
    return f"Success: LoRA adapter '{name}' added successfully."


async def unload(call: Call, data: UnloadRequest) -> str:
    """Unload an adapter, when the requests that use it have ended."""
    _root(call)
    name = data.lora_name
    try:
        if not call.record.may_use(name):
            raise AdapterNotFound("it is not among those that the key may use", name=name)
        await call.context.engine.unload_adapter(name)
    except AdapterNotFound as error:
        raise _not_found(f"The lora adapter '{name}' cannot be found.", "lora_name") from error
    return f"Success: LoRA adapter '{name}' removed successfully."


async def upload(call: Call) -> Uploaded:
    """Upload an adapter: its two files as multipart/form-data; ``lora_name`` and ``load_inplace`` are in the
    query."""
    if call.context.settings.max_upload_bytes is None:
        text = "adapters cannot be uploaded: the server was started without max_upload_bytes"
        raise ApiError(403, text, code="adapter_uploads_disabled")
    query = QueryParams(call.scope.get("query_string", b""))
    name, replace = query.get("lora_name", ""), query.get("load_inplace", "false") == "true"
    _check_may_load(call, name, replace=replace)
    assert isinstance(call.receive, BoundedBody)
    body = await call.receive.whole()
    kind = dict(call.scope["headers"]).get(b"content-type", b"").decode("latin-1")
    files = await start_read("aioengine-upload", lambda: read_form(body, kind))
    info = await call.context.engine.load_adapter_files(name, *files, replace=replace)
    return msgspec.convert(info, Uploaded, from_attributes=True)


def read_form(body: bytes, content_type: str) -> tuple[bytes, bytes]:
    """Return the two files of an upload. Blocking. Raises ApiError if it is no such form."""
    main, options = parse_options_header(content_type)
    if main != "multipart/form-data":
        text = "the upload must be multipart/form-data with the two files that save_pretrained writes"
        raise ApiError(415, text, code="unsupported_media_type")
    try:
        size = len(body) + 1
        form = MultipartParser(
            BytesIO(body), options.get("boundary", ""), part_limit=16, spool_limit=size, memory_limit=size
        )
        found = [(posixpath.basename(part.filename or part.name), part) for part in form]
        files = {name: part.raw for name, part in found if name in (CONFIG, WEIGHTS)}
    except Exception as error:  # the library does not say which errors a damaged form causes
        text = f"the upload cannot be read: the form is damaged: {str(error)[:200]}"
        raise ApiError(400, text, code="invalid_value") from error
    if sorted(name for name, _ in found if name in files) != [CONFIG, WEIGHTS]:
        text = f"the upload must have one {CONFIG} and one {WEIGHTS}"
        raise ApiError(400, text, code="invalid_value")
    if len(files[CONFIG]) > MAX_CONFIG_BYTES:
        raise ApiError(413, f"{CONFIG} has more than {MAX_CONFIG_BYTES} bytes", code="request_too_large")
    return files[CONFIG], files[WEIGHTS]


async def _place(call: Call, root: str, name: str, path: str) -> str:
    """Return the folder or the URL of a path below ``root``. Raises AdapterNotFound if it is not below it,
    and ApiError if the key may not use the adapter that is called as the path is."""
    folders, lora = call.context.folders, call.context.engine.config.lora
    if folders is None:
        place = str(source_below(root, name, path))
        below = place.removeprefix(root.rstrip("/") + "/")
    else:
        below = _relative(path, folders.root)
    if not call.record.may_use(below):
        raise _not_allowed(f"from {path[:300]!r}", "lora_path")
    if folders is None or lora is None:
        return place
    return str(await within(lora.load_timeout, name, folders.resolve(below)))


def _relative(path: str, root: Path) -> str:
    """Return the path relative to ``root``. A path outside gets ".." parts, which the resolver refuses."""
    return os.path.relpath(path, root) if os.path.isabs(path) else path.removeprefix("./").rstrip("/")


def _check_may_load(call: Call, name: str, *, replace: bool) -> None:
    """Raise ApiError if no adapter can have this name, if the request's key may not load one of it, if there
    is one that it does not ``replace``, or if there are too many others."""
    engine = call.context.engine
    if NAME_RULE.fullmatch(name) is None or name in call.context.model_names:
        text = f"lora_name: {name[:300]!r} is the base model's name, or not {NAME_RULE_TEXT}"
        raise ApiError(400, text, param="lora_name")
    if not call.record.may_use(name):
        raise _not_allowed(f"that is called {name!r}", "lora_name")
    is_known = engine.find_adapter(name) is not None
    if is_known and not replace:
        raise ApiError(400, f"The lora adapter '{name}' has already been loaded.", param="lora_name")
    if not is_known and (count := engine.count_adapters()) >= MAX_ADAPTERS:
        text = f"there are {count} adapters, which is the maximum; unload some first"
        raise ApiError(400, text, param="lora_name", code="too_many_adapters")


def _root(call: Call) -> str:
    root = call.context.adapter_root
    if root is None:
        why = "the server was started without an adapter root"
        text = f"adapters cannot be loaded or unloaded over HTTP: {why}"
        raise ApiError(403, text, code="adapter_loading_disabled")
    return root


def _not_found(text: str, param: str) -> ApiError:
    return ApiError(404, text, param=param, code="adapter_not_found")


def _not_allowed(what: str, param: str) -> ApiError:
    text = f"this API key may not load an adapter {what}"
    return ApiError(403, text, param=param, code="adapter_not_allowed")
