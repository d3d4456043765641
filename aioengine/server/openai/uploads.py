"""Uploading adapters: a PEFT folder as a zip or tar archive, or its two files as a form. Nothing is written
to disk.

Off unless the server has ``max_upload_bytes``. What an archive unpacks to is bounded by it as well.
"""

from __future__ import annotations

import gzip
import io
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import msgspec
from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromQuery
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from aioengine.adapters.names import NAME_RULE, NAME_RULE_TEXT
from aioengine.adapters.read_threads import ReadThreads
from aioengine.errors import AdapterError
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, to_api_error
from aioengine.server.framework import RESPONSES, record_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_MEMBERS = 1000
MAX_DIRECTORY_BYTES = 1 << 18
"""Of a zip archive's directory, which is read before anything else is known."""
MAX_CONFIG_BYTES = 256 << 10
_FLAGS = {"": False, "false": False, "0": False, "true": True, "1": True}
_PIECE = 1 << 20
_BESIDE = 16 << 20
"""What a tar archive may hold beside the two files."""


class Uploaded(msgspec.Struct, kw_only=True):
    """The adapter as it was loaded."""

    name: str
    version: int
    digest: str
    """SHA-256 of its two files, one after the other."""
    rank: int
    bytes: int


def upload_routes(context: Context) -> list[HTTPRouteHandler]:
    threads = ReadThreads("aioengine-upload")

    @post(
        "/v1/upload_lora_adapter",
        status_code=200,
        responses=RESPONSES,
        summary="Upload an adapter: a PEFT folder as zip or tar, or its files as multipart/form-data",
    )
    async def upload(
        request: Request[Any, Any, Any], lora_name: FromQuery[str] = "", load_inplace: FromQuery[str] = ""
    ) -> Uploaded:
        most = context.settings.max_upload_bytes
        if most is None:
            text = "adapters cannot be uploaded: the server was started without max_upload_bytes"
            raise ApiError(403, text, type="permission_error", code="adapter_uploads_disabled")
        if NAME_RULE.fullmatch(lora_name) is None or lora_name in context.model_names:
            text = f"lora_name: {lora_name[:300]!r} is the base model's, or not {NAME_RULE_TEXT}"
            raise ApiError(400, text, param="lora_name")
        if load_inplace not in _FLAGS:
            raise ApiError(400, "load_inplace: must be true or false", param="load_inplace")
        replace = _FLAGS[load_inplace]
        if not record_of(request).identity.models.allow(lora_name):
            raise ApiError(
                403,
                f"this API key may not load an adapter that is called {lora_name!r}",
                type="permission_error",
                param="lora_name",
                code="adapter_not_allowed",
            )
        known = any(info.name == lora_name for info in context.engine.adapters())
        if known and not replace:
            raise ApiError(400, f"The lora adapter '{lora_name}' has already been loaded.", param="lora_name")
        body, kind = await request.body(), request.headers.get("content-type", "")
        try:
            config, weights = await threads.run(lambda: unpack(body, kind, most))
            info = await context.engine.load_adapter_files(lora_name, config, weights, replace=replace)
        except AdapterError as error:
            raise to_api_error(error, context.settings) from error
        return Uploaded(
            name=info.name, version=info.version, digest=info.digest, rank=info.rank, bytes=info.bytes
        )

    return [upload]


def unpack(body: bytes, content_type: str, most: int) -> tuple[bytes, bytes]:
    """The two files of an upload. Blocking. Raises ApiError for what is no such upload, has other than one
    of each, or unpacks to more than ``most`` bytes."""
    main, options = parse_options_header(content_type)
    try:
        if main == "multipart/form-data":
            members = _parts(body, options.get("boundary", ""))
        elif body[:4] == b"PK\x03\x04":
            members = _zipped(body, most)
        else:
            members = _tarred(body, most)
        found: dict[str, tuple[str, bytes]] = {}
        for path, data in members:
            folder, name = posixpath.split(path)
            if name in found:
                _refuse(f"it has more than one {name}")
            found[name] = folder, data
    except (zipfile.BadZipFile, tarfile.TarError, MultipartError, zlib.error, EOFError, OSError) as error:
        _refuse(f"the archive or form is damaged: {error}", error)
    except (NotImplementedError, RuntimeError) as error:  # an unknown compression; encrypted
        _refuse(f"the archive is not supported: {error}", error)
    missing = [name for name in (CONFIG, WEIGHTS) if name not in found]
    if missing:
        _refuse(f"it has no {' and no '.join(missing)}; upload what save_pretrained writes")
    if found[CONFIG][0] != found[WEIGHTS][0]:
        _refuse("its two files are in different folders")
    return found[CONFIG][1], found[WEIGHTS][1]


def _limit(path: str, most: int) -> int | None:
    """How long a wanted file may be; None for others."""
    name = posixpath.basename(path)
    return {CONFIG: min(most, MAX_CONFIG_BYTES), WEIGHTS: most}.get(name)


def _read(file: Any, path: str, most: int) -> bytes:
    parts, size = [], 0
    while part := file.read(_PIECE):
        size += len(part)
        if size > most:
            _refuse(f"{path[:200]} has more than {most} bytes", status=413)
        parts.append(part)
    return b"".join(parts)


def _zipped(body: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    end = body.rfind(b"PK\x05\x06", max(0, len(body) - (1 << 16) - 22))
    if end < 0 or len(body) < end + 22:
        _refuse("the zip archive has no directory")
    if struct.unpack_from("<I", body, end + 12)[0] > MAX_DIRECTORY_BYTES:
        _refuse(f"the zip archive's directory has more than {MAX_DIRECTORY_BYTES} bytes")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        for info in archive.infolist()[:MAX_MEMBERS]:
            limit = _limit(info.filename, most)
            if limit is not None and not info.is_dir():
                with archive.open(info) as file:
                    yield info.filename, _read(file, info.filename, limit)


def _tarred(body: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    stream: Any = io.BytesIO(body)
    if body[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(fileobj=stream)
    with tarfile.open(fileobj=cast(Any, _Bounded(stream, most + _BESIDE)), mode="r|") as archive:
        for count, info in enumerate(archive):
            if count >= MAX_MEMBERS:
                _refuse(f"the archive has more than {MAX_MEMBERS} members")
            limit = _limit(info.name, most)
            if limit is not None and info.isreg() and info.sparse is None:
                file = archive.extractfile(info)
                assert file is not None
                yield info.name, _read(file, info.name, limit)


class _Bounded:
    """A stream that refuses to give more than ``most`` bytes."""

    def __init__(self, stream: Any, most: int) -> None:
        self._stream = stream
        self._left = most

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            _refuse("the archive unpacks to more than is allowed", status=413)
        return data


def _parts(body: bytes, boundary: str) -> Iterator[tuple[str, bytes]]:
    name, data = "", bytearray()
    with PushMultipartParser(boundary, max_segment_count=16) as parser:
        for event in parser.parse(body):
            if isinstance(event, MultipartSegment):
                name, data = posixpath.basename(event.filename or event.name), bytearray()
            elif event:
                data += event
            elif name in (CONFIG, WEIGHTS):
                if name == CONFIG and len(data) > MAX_CONFIG_BYTES:
                    _refuse(f"{CONFIG} has more than {MAX_CONFIG_BYTES} bytes", status=413)
                yield name, bytes(data)


def _refuse(reason: str, cause: BaseException | None = None, *, status: int = 400) -> NoReturn:
    code = "request_too_large" if status == 413 else "invalid_value"
    raise ApiError(status, f"the upload cannot be read: {reason}", code=code) from cause
