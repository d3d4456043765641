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
from typing import Any, NoReturn

import msgspec
from multipart import MultipartSegment, PushMultipartParser, parse_options_header

from aioengine.adapters.read_threads import ReadThreads
from aioengine.errors import AdapterError
from aioengine.server.call import Call
from aioengine.server.errors import ApiError
from aioengine.server.openai.adapters import check_may_load, load_error
from aioengine.server.transport.body import BoundedBody

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_MEMBERS = 1000
MAX_DIRECTORY_BYTES = 1 << 18
"""Maximum bytes of a zip archive's directory, which is read before anything else is known."""
MAX_CONFIG_BYTES = 256 << 10
_FLAGS = {"": False, "false": False, "0": False, "true": True, "1": True}
_PIECE = 1 << 20
_BESIDE = 16 << 20
"""Bytes that a tar archive may hold beside the two files."""
_SEARCHED = 1 << 17
"""Bytes in which zipfile looks for a directory's end."""
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""The standard library decompresses others without a bound on the output."""
_LONG_NAMES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
"""Types of headers that may hold the name of the next member."""
_OTHER_HEADERS = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
_MAX_TAR_HEADER = 1 << 13
"""Bytes of such a header."""


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
        raise ApiError(403, text, type="permission_error", code="adapter_uploads_disabled")
    if query.load_inplace not in _FLAGS:
        raise ApiError(400, "load_inplace: must be true or false", param="load_inplace")
    replace = _FLAGS[query.load_inplace]
    check_may_load(call, name, replace=replace)
    assert isinstance(call.receive, BoundedBody)
    body = await call.receive.whole()
    kind = dict(call.scope["headers"]).get(b"content-type", b"").decode("latin-1")
    try:
        config, weights = await ReadThreads("aioengine-upload").run(lambda: unpack(body, kind, most))
        info = await call.context.engine.load_adapter_files(name, config, weights, replace=replace)
    except AdapterError as error:
        raise load_error(call, error, replace=replace) from error
    return Uploaded(
        name=info.name, version=info.version, digest=info.digest, rank=info.rank, bytes=info.bytes
    )


def unpack(body: bytes, content_type: str, most: int) -> tuple[bytes, bytes]:
    """Return the two files of an upload. Blocking. Raises ApiError if it is no such upload, has not exactly
    one of each, or unpacks to more than ``most`` bytes."""
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


class _ZipFile(io.BytesIO):
    """A zip archive whose directory has to be small, whatever the archive says of its size."""

    most = max(MAX_DIRECTORY_BYTES, _SEARCHED)

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self.most:
            _refuse(f"the zip archive's directory has more than {MAX_DIRECTORY_BYTES} bytes")
        return super().read(size)


def _zipped(body: bytes, most: int) -> Iterator[tuple[str, bytes]]:
    file = _ZipFile(body)
    with zipfile.ZipFile(file) as archive:
        file.most = len(body)
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
    """Read a tar archive header by header. ``tarfile`` would read headers of any size, in time that grows
    with the square of it, and expand sparse files."""
    stream = _Unpacked(body, most + _BESIDE)
    longer = ""
    for _ in range(MAX_MEMBERS):
        block = stream.exactly(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if info.size < 0:
            raise tarfile.HeaderError("a size below 0")
        padded = info.size + -info.size % tarfile.BLOCKSIZE
        if info.type in _LONG_NAMES:
            if info.size > _MAX_TAR_HEADER:
                _refuse(f"a header in the tar archive has more than {_MAX_TAR_HEADER} bytes")
            data = stream.exactly(padded)[: info.size]
            name = data.rstrip(b"\0") if info.type == tarfile.GNUTYPE_LONGNAME else _extended_name(data)
            longer = name.decode("utf-8", "surrogateescape") or longer
            continue
        limit = None
        if info.type not in _OTHER_HEADERS:
            path, longer = longer or info.name, ""
            limit = _limit(path, most) if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None
        if limit is None:
            for begin in range(0, padded, _PIECE):
                stream.exactly(min(_PIECE, padded - begin))
        else:
            _check_size(path, info.size, limit)
            yield path, stream.exactly(padded)[: info.size]
    _refuse(f"the archive has more than {MAX_MEMBERS} members")


def _extended_name(data: bytes) -> bytes:
    """Return the name in a header of records, each of which is "LENGTH KEY=VALUE" and a line's end
    (POSIX.1-2001, pax); empty if it has none."""
    at, name = 0, b""
    while at < len(data):
        space = data.find(b" ", at, at + 10)
        length = int(data[at:space]) if data[at:space].isdigit() else 0
        key, equals, value = data[space + 1 : at + length].partition(b"=")
        if not (equals and value.endswith(b"\n") and at + length <= len(data)):
            raise tarfile.HeaderError("an extended header is malformed")
        if key.startswith(b"GNU.sparse"):
            _refuse("the tar archive has sparse files")
        if key == b"path":
            name = value[:-1]
        at += length
    return name


class _Unpacked:
    """A stream of a tar archive, which may be gzipped, that gives at most ``most`` bytes. Of gzip one member
    is read; ``gzip`` would also read all members that follow."""

    def __init__(self, body: bytes, most: int) -> None:
        self._body, self._left = io.BytesIO(body), most
        is_gzip = body[:2] == b"\x1f\x8b"
        self._unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if is_gzip else None

    def exactly(self, size: int) -> bytes:
        """Read exactly ``size`` bytes. Raises EOFError if there are fewer."""
        self._left -= size
        if self._left < 0:
            _refuse("the archive unpacks to more than is allowed", status=413)
        data = self._body.read(size) if self._unpacker is None else self._gunzip(self._unpacker, size)
        if len(data) < size:
            raise EOFError("it is cut off")
        return data

    def _gunzip(self, unpacker: Any, size: int) -> bytes:
        parts: list[bytes] = []
        while size > 0 and not unpacker.eof:
            packed = unpacker.unconsumed_tail or self._body.read(1 << 16)
            if not packed:
                break
            parts.append(unpacker.decompress(packed, size))
            size -= len(parts[-1])
        return b"".join(parts)


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
