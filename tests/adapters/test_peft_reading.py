"""How the bytes of an adapter are read: exact conversions, failing disks, files that change meanwhile."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from support.peft_files import CONFIG, PREFIX, SPEC, WEIGHTS, edit_config, read, refused

from aioengine.errors import AdapterLoadError

# B of q_proj at rank 16 has 65536 elements: as many as there are 16-bit floats, and more than one piece.
WIDE = msgspec.structs.replace(SPEC, hidden_size=4096, num_heads=512, num_layers=1)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    defaults = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / CONFIG).write_text(json.dumps(defaults | config))
    save_file(tensors, folder / WEIGHTS)


def every_float(dtype: torch.dtype) -> torch.Tensor:
    """[4096, 16]: each finite value of a 16-bit dtype; a sample of float32's."""
    patterns = torch.arange(65536, dtype=torch.int32)
    if dtype == torch.float32:
        values = (patterns << 16 | patterns).view(torch.float32)
    else:
        values = patterns.to(torch.int16).view(dtype)
    return torch.where(values.isfinite(), values, torch.zeros_like(values)).view(4096, 16)


@pytest.mark.parametrize("slot", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("alpha", [16, 4, 5.3, 1e3])
def test_scaled_in_float32_and_rounded_once(
    tmp_path: Path, stored: torch.dtype, slot: torch.dtype, alpha: float
) -> None:
    a, b = torch.randn(16, 4096).to(stored), every_float(stored)
    keys = {f"{PREFIX}.lora_A.weight": a, f"{PREFIX}.lora_B.weight": b}
    write(tmp_path, keys, lora_alpha=alpha)
    packed = read(tmp_path, WIDE, dtype=slot, finite=False)  # large values overflow
    actual = packed.tensors[0, "q_proj"]
    assert torch.equal(actual[0], a.float().to(slot))
    assert torch.equal(actual[1], (b.float() * (alpha / 16)).to(slot))
    assert all(tensor.is_contiguous() and tensor.dtype == slot for tensor in actual)


def test_overflow_by_scaling_is_found_wherever_it_is(tmp_path: Path) -> None:
    a, b = torch.randn(16, 4096).half(), torch.zeros(4096, 16).half()
    b[4095, 15] = 60000.0
    write(tmp_path, {f"{PREFIX}.lora_A.weight": a, f"{PREFIX}.lora_B.weight": b})
    assert read(tmp_path, WIDE, dtype=torch.float16).tensors[0, "q_proj"][1].isfinite().all()
    edit_config(tmp_path, lora_alpha=18)
    with pytest.raises(Exception, match=r"model\.layers\.0\.self_attn\.q_proj: the scaled weights overflow"):
        read(tmp_path, WIDE, dtype=torch.float16)
    assert read(tmp_path, WIDE, dtype=torch.bfloat16).tensors[0, "q_proj"][1].isfinite().all()


def test_digest_is_sha256_of_both_files(adapter: Path) -> None:
    content = (adapter / CONFIG).read_bytes() + (adapter / WEIGHTS).read_bytes()
    assert read(adapter).digest == hashlib.sha256(content).hexdigest()
    for _ in range(100):  # the weights are converted while they are hashed
        assert read(adapter, dtype=torch.bfloat16).digest == hashlib.sha256(content).hexdigest()


# -- disks ---------------------------------------------------------------------------------------

Read = Callable[[memoryview], int]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, memoryview, Read], int]], None]:
    """Puts ``behave(file name, buffer, the real read)`` in place of each read."""

    def install(behave: Callable[[str, memoryview, Read], int]) -> None:
        class File(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                return behave(Path(str(self.name)).name, buffer, super().readinto)

        monkeypatch.setattr(io, "FileIO", File)

    return install


def failure(folder: Path) -> AdapterLoadError:
    with pytest.raises(AdapterLoadError) as caught:
        read(folder)
    assert "'sql'" in str(caught.value) and str(folder) in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("code", "transient"),
    [
        *((code, True) for code in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EMFILE)),
        *((code, False) for code in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.EINVAL)),
    ],
)
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_disk_that_fails(adapter: Path, disk: Any, file: str, code: int, transient: bool) -> None:
    def fail(name: str, buffer: memoryview, real: Read) -> int:
        if name == file:
            raise OSError(code, os.strerror(code))
        return real(buffer)

    disk(fail)
    error = failure(adapter)
    assert error.transient is transient
    assert file in str(error) and os.strerror(code) in str(error)


def test_short_reads(adapter: Path, disk: Any) -> None:
    expected = read(adapter)
    disk(lambda name, buffer, real: real(buffer[:1001]))
    actual = read(adapter)
    assert actual.digest == expected.digest
    for place, pair in expected.tensors.items():
        assert all(map(torch.equal, pair, actual.tensors[place]))


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_shrinks(adapter: Path, disk: Any, file: str) -> None:
    def shrink(name: str, buffer: memoryview, real: Read) -> int:
        if name == file:
            os.truncate(adapter / file, 0)
        return real(buffer)

    disk(shrink)
    error = failure(adapter)
    assert error.transient
    assert file in str(error) and "shrank" in str(error)


def write_again(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def replace(path: Path) -> None:
    """By a file of the same size and time, as ``rsync -t`` does."""
    status, other = path.stat(), path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [write_again, append, replace, Path.unlink])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_changes_while_it_is_read(
    adapter: Path, disk: Any, file: str, change: Callable[[Path], None]
) -> None:
    changed = False

    def behave(name: str, buffer: memoryview, real: Read) -> int:
        nonlocal changed
        count = real(buffer)
        if name == WEIGHTS and not changed:  # after the configuration, within the weights
            changed = True
            change(adapter / file)
        return count

    disk(behave)
    error = failure(adapter)
    assert error.transient
    assert f"{file} changed while it was read" in str(error)


def test_a_torn_file_is_no_bad_adapter(adapter: Path, disk: Any) -> None:
    """What looks malformed because somebody writes it is worth another try."""

    def tear(name: str, buffer: memoryview, real: Read) -> int:
        count = real(buffer)
        if name == WEIGHTS and len(buffer) > 8:
            buffer[:] = bytes(len(buffer))
            write_again(adapter / WEIGHTS)
        return count

    disk(tear)
    assert failure(adapter).transient


def test_what_cannot_fit_is_refused_from_its_header(adapter: Path, disk: Any) -> None:
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [1 << 28], "data_offsets": [0, 1 << 30]}}
    text = json.dumps(header).encode()
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(adapter / WEIGHTS, 8 + len(text) + (1 << 30))

    def only_little(name: str, buffer: memoryview, real: Read) -> int:
        assert len(buffer) < 1 << 20
        return real(buffer)

    disk(only_little)
    refused(adapter, WEIGHTS, "model.embed_tokens.weight", "replaces embeddings")
