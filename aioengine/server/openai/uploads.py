"""Uploading adapters: a PEFT folder as a zip or tar archive, or its two files as a form. Nothing is written
to disk.

Off unless the server has ``max_upload_bytes``. What an archive unpacks to is bounded by it as well.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import NoReturn

import msgspec
from multipart import MultipartSegment, PushMultipartParser, parse_options_header

from aioengine.adapters.read_threads import ReadThreads
from aioengine.errors import AdapterError
from aioengine.server.context import Call
from aioengine.server.errors import ApiError
from aioengine.server.openai.adapters import check_may_load, load_error
from aioengine.server.transport.body import BoundedBody

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_MEMBERS = 1000
MAX_DIRECTORY_BYTES = 1 << 18
"""Maximum bytes of a zip archive's directory, which is read before anything else is known."""
MAX_HEADER_BYTES = 1 << 13
"""Maximum bytes of a tar archive's header with a long name."""
MAX_CONFIG_BYTES = 256 << 10
_FLAGS = {"": False, "false": False, "0": False, "true": True, "1": True}
_BESIDE = 16 << 20
"""Bytes that a tar archive may hold beside the two files."""
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The standard library decompresses others without a bound on the output."""


class Uploaded(msgspec.Struct, kw_only=True):
    """The adapter as it was loaded."""

    name: str
    version: int
    digest: str
    """SHA-256 of its two files, one after the other."""
    rank: int
    bytes: int


class UploadQuery(msgspec.Struct, kw_only=True):
    lora_name: str = ""
    """The adapter's name in requests."""
    load_inplace: str = ""
    """Whether it replaces the adapter of this name: true or false."""


async def upload(call: Call, query: UploadQuery) -> Uploaded:
    """Upload an adapter: a PEFT folder as zip or tar, or its files as multipart/form-data."""
    most, name = call.context.settings.max_upload_bytes, query.lora_name
    if most is None:
        text = "adapters cannot be uploaded: the server was started without max_upload_bytes"
        raise ApiError(403, text, code="adapter_uploads_disabled")
    if query.load_inplace not in _FLAGS:
        raise ApiError(400, "load_inplace: must be true or false", param="load_inplace")
    replace = _FLAGS[query.load_inplace]
    check_may_load(call, name, replace=replace)
    assert isinstance(call.receive, BoundedBody)
    body = await call.receive.whole()
    kind = dict(call.scope["headers"]).get(b"content-type", b"").decode("latin-1")
    try:
        config, weights = await ReadThreads("aioengine-upload").start(lambda: unpack(body, kind, most))
        info = await call.context.engine.load_adapter_files(name, config, weights, replace=replace)
    except AdapterError as error:
        raise load_error(call, error, replace=replace) from error
    return msgspec.convert(info, Uploaded, from_attributes=True)


def unpack(body: bytes, content_type: str, most: int) -> tuple[bytes, bytes]:
    """Return the two files of an upload. Blocking. Raises ApiError if it is no such upload, has not exactly
    one of each, or unpacks to more than ``most`` bytes."""
    main, options = parse_options_header(content_type)
    found: dict[str, tuple[str, bytes]] = {}
    try:
        if main == "multipart/form-data":
            members = _parts(body, options.get("boundary", ""))
        else:
            members = (_zipped if body[:4] == b"PK\x03\x04" else _tarred)(body, most)
        for path, data in members:
            folder, name = posixpath.split(path)
            if name in found:
                _refuse(f"it has more than one {name}")
            found[name] = folder, data
    except ApiError:
        raise
    except (NotImplementedError, RuntimeError) as error:  # an unknown compression; encrypted
        _refuse(f"the archive is not supported: {error}", error)
    except Exception as error:  # the libraries do not say which errors damaged bytes cause
        _refuse(f"the archive or form is damaged: {str(error)[:200]}", error)
    missing = [name for name in (CONFIG, WEIGHTS) if name not in found]
    if missing:
        _refuse(f"it has no {' and no '.join(missing)}; upload what save_pretrained writes")
    if found[CONFIG][0] != found[WEIGHTS][0]:
        _refuse("its two files are in different folders")
    return found[CONFIG][1], found[WEIGHTS][1]


def _limit(path: str, most: int) -> int | None:
    """Maximum size of a wanted file; None for other files."""
    name = posixpath.basename(path)
    return {CONFIG: min(most, MAX_CONFIG_BYTES), WEIGHTS: most}.get(name)


def _check_size(path: str, size: int, most: int) -> None:
    if size > most:
        _refuse(f"{path[:200]} has more than {most} bytes", status=413)


class _Archive(io.BytesIO):
    """An archive whose headers have to be small and few, whatever it says of them."""

    def __init__(self, body: bytes, what: str, most: int, reads: int) -> None:
        super().__init__(body)
        self._what, self._most, self._reads = what, most, reads

    def trust(self) -> None:
        """Bound reads no longer: the headers are known."""
        self._most = self._reads = len(self.getbuffer()) + 1

    def read(self, size: int | None = -1) -> bytes:
        self._reads -= 1
        if self._reads < 0:
            _refuse(f"the archive has more than {MAX_MEMBERS} members")
        if size is not None and size > self._most:
            _refuse(f"the {self._what} has more than {self._most} bytes")
        return super().read(size)


def _zipped(body: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    file = _Archive(body, "zip archive's directory", MAX_DIRECTORY_BYTES, MAX_MEMBERS)
    with zipfile.ZipFile(file) as archive:
        file.trust()
        for info in archive.infolist()[:MAX_MEMBERS]:
            limit = _limit(info.filename, most)
            if limit is None or info.is_dir():
                continue
            if info.compress_type not in _COMPRESSIONS:
                raise NotImplementedError("files have to be deflated or stored")
            with archive.open(info) as member:
                data = member.read(limit + 1)
            _check_size(info.filename, len(data), limit)
            yield info.filename, data


def _tarred(body: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    """Read a tar archive, which may be gzipped. Of gzip one member is read; ``gzip`` would also read all
    members that follow."""
    if body[:2] == b"\x1f\x8b":
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        body = unpacker.decompress(body, most + _BESIDE)
        if unpacker.unconsumed_tail:
            _refuse("the archive unpacks to more than is allowed", status=413)
        if not unpacker.eof or not body:
            raise EOFError("it is cut off")
    # Each member has one block of a header, or three with a longer name.
    file = _Archive(body, "tar archive's header", MAX_HEADER_BYTES, 4 * MAX_MEMBERS)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for count, member in enumerate(archive):
            if count == MAX_MEMBERS:
                _refuse(f"the archive has more than {MAX_MEMBERS} members")
            limit = _limit(member.name, most) if member.isreg() else None
            if member.issparse() or any(key.startswith("GNU.sparse") for key in member.pax_headers):
                _refuse("the tar archive has sparse files")
            if limit is not None:
                _check_size(member.name, member.size, limit)
                data = body[member.offset_data : member.offset_data + member.size]
                if len(data) < member.size:
                    raise EOFError("it is cut off")
                yield member.name, data


def _parts(body: bytes, boundary: str) -> Iterator[tuple[str, bytes]]:
    name, data = "", bytearray()
    with PushMultipartParser(boundary, max_segment_count=16) as parser:
        for event in parser.parse(body):
            if isinstance(event, MultipartSegment):
                name, data = posixpath.basename(event.filename or event.name), bytearray()
            elif event:
                data += event
            elif name in (CONFIG, WEIGHTS):
                _check_size(name, len(data), MAX_CONFIG_BYTES if name == CONFIG else len(data))
                yield name, bytes(data)


def _refuse(reason: str, cause: BaseException | None = None, *, status: int = 400) -> NoReturn:
    code = "request_too_large" if status == 413 else "invalid_value"
    raise ApiError(status, f"the upload cannot be read: {reason}", code=code) from cause
