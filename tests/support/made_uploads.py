"""Makes up uploads of adapters: archives with traversal, links, bombs, thousands of members and damage."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import tarfile
import warnings
import zipfile
from urllib.parse import quote

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMED = 4
"""Members with names that mean something; what follows them is empty."""
_SETTINGS = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
_HEADERS = (b"{}", b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}', b"[" * 50)
_FOLDERS = ("", "", "a/", "../", "/", "a/../../", "x" * 200 + "/")
_FILES = (CONFIG, WEIGHTS, WEIGHTS, "adapter_model.bin", "x")
_LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE)
_TAR_FORMATS = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_SYMBOLIC_LINK = 0o120777 << 16


def upload(draw: random.Random, model: str) -> tuple[str, bytes, str]:
    """Return a query, a body and a content type. ``model`` is the base model's name."""
    name = quote(draw.choice(["up", "up", "up2", model, "", "../x", "a" * 300]), safe="")
    query = f"lora_name={name}&load_inplace={draw.choice(['true', 'false', 'maybe'])}"
    boundary = draw.choice(["b", "b", "", "x" * 300, '"', "b; boundary=c"])
    kinds = ["application/zip", "application/x-tar", f"multipart/form-data; boundary={boundary}"]
    make, kind = draw.choice(list(zip((_zipped, _tarred, _form), kinds, strict=True)))
    return query, make(draw), kind if draw.random() < 0.8 else draw.choice(kinds)


def _count(draw: random.Random) -> int:
    return draw.choice([0, 1, 2, 2, 2, 3, 999, 1001, 5000])


def _path(draw: random.Random, index: int) -> str:
    return draw.choice(_FOLDERS) + draw.choice(_FILES) if index < NAMED else str(index)


def _content(draw: random.Random, index: int) -> bytes:
    if index >= NAMED:
        return b""
    header = draw.choice(_HEADERS)
    tensors = len(header).to_bytes(8, "little") + header + bytes(16)
    huge = (2**62).to_bytes(8, "little")
    return draw.choice([_SETTINGS.encode(), tensors, b"", b"{", huge, bytes(9 << 20), draw.randbytes(100)])


def _zipped(draw: random.Random) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # names that come twice
        for index in range(_count(draw)):
            info = zipfile.ZipInfo(_path(draw, index))
            info.compress_type = draw.choice(_COMPRESSIONS)
            if draw.random() < 0.1:
                info.external_attr = _SYMBOLIC_LINK
            archive.writestr(info, _content(draw, index))
    return file.getvalue()


def _tarred(draw: random.Random) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=draw.choice(_TAR_FORMATS)) as archive:
        for index in range(_count(draw)):
            info, content = tarfile.TarInfo(_path(draw, index)), _content(draw, index)
            if draw.random() < 0.2:
                info.type, info.linkname, content = draw.choice(_LINKS), "/etc/passwd", b""
            info.size = len(content)
            with contextlib.suppress(ValueError):  # a name that is too long
                archive.addfile(info, io.BytesIO(content))
    return gzip.compress(file.getvalue(), 1, mtime=0) if draw.random() < 0.5 else file.getvalue()


def _form(draw: random.Random) -> bytes:
    parts = []
    for index in range(_count(draw)):
        name = _path(draw, index)
        head = f'--b\r\ncontent-disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        parts.append(head.encode() + _content(draw, index) + b"\r\n")
    return b"".join(parts) + draw.choice([b"--b--\r\n", b"", b"--b"])
