"""The folder of prefixes: who may use it, what stays in it, and that no harmed file is believed."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aioengine import CachePin, EngineConfig
from aioengine.errors import ConfigError, RequestInvalid
from aioengine.runtime.prefixes.files import PrefixFiles

ABOUT = {"format": "test", "prefix": "ab"}
TENSORS = {
    "k.0": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "v.0": torch.arange(6).to(torch.bfloat16).view(2, 3),
    "v.1": torch.arange(-4, 4, dtype=torch.int8).view(2, 4),
}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("kv-*"))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}"):
        PrefixFiles(folder, 10**6).open()
    assert not files(folder)
    PrefixFiles(folder / "own", 10**6).open()  # a folder in it is only this user's
    assert (folder / "own").stat().st_mode & 0o077 == 0


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to user"):
        PrefixFiles(tmp_path, 10**6).open()


def test_engines_with_equal_process_ids_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers: both write the same prefix at the same time, and delete for room."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    one = PrefixFiles(tmp_path, 10**6)
    one.open()
    size = one.write("0" * 64, TENSORS, ABOUT)
    engines = [PrefixFiles(tmp_path, 3 * size) for _ in range(4)]

    def use(files: PrefixFiles) -> None:
        for index in range(100):
            name = f"{index % 5}" * 64
            files.open()
            with contextlib.suppress(FileNotFoundError):  # deleted for another's, before it was complete
                files.write(name, TENSORS, ABOUT)
            found = files.read(name, ABOUT)
            assert found is None or all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)

    with ThreadPoolExecutor(len(engines)) as threads:
        list(threads.map(use, engines))
    one.write("9" * 64, TENSORS, ABOUT)
    assert one.read("9" * 64, ABOUT) is not None
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "fields",
    [
        {"executor": "ray"},
        {"enable_prefix_caching": False},
        {"max_prefix_pins": 0},
        {"kv_cache_dir": ""},
        {"kv_cache_dir": 3},
        {"kv_cache_dir_bytes": "many"},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dir"):
        EngineConfig(**{"model": "tiny", "kv_cache_dir": "kv", **fields})
    with pytest.raises(RequestInvalid, match="save"):
        CachePin(tokens=1, save=1)  # type: ignore[arg-type]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), cut=st.booleans())
def test_a_harmed_file_is_never_believed(at: float, bits: int, cut: bool, tmp_path: Path) -> None:
    made = PrefixFiles(tmp_path, 10**6)
    made.open()
    assert made.write("0" * 64, TENSORS, ABOUT) == files(tmp_path)[0].stat().st_size
    found = made.read("0" * 64, ABOUT)
    assert found is not None and all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)
    [path] = files(tmp_path)
    data = bytearray(path.read_bytes())
    place = int(at * len(data))
    data[place] ^= bits
    path.write_bytes(data[:place] if cut else data)
    found = made.read("0" * 64, ABOUT)
    if found is None:
        assert not path.exists()
    else:  # another kind of blank in the header
        assert found.keys() == TENSORS.keys() and all(
            torch.equal(found[key], TENSORS[key]) for key in TENSORS
        )


def test_what_was_used_least_recently_makes_room_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"x" * 10**5)
    one = PrefixFiles(tmp_path / "probe", 10**6)
    one.open()
    size = one.write("0" * 64, TENSORS, ABOUT)
    made = PrefixFiles(tmp_path, 3 * size)
    for index in range(3):
        made.write(f"{index}" * 64, TENSORS, ABOUT)
        os.utime(tmp_path / f"kv-{f'{index}' * 64}.safetensors", (index, index))
    assert made.has("0" * 64) and not made.has("7" * 64)  # now the most recently used
    assert made.write("3" * 64, TENSORS, ABOUT) == size
    assert [path.name[3] for path in files(tmp_path)] == ["0", "2", "3"]
    assert made.read("1" * 64, ABOUT) is None
    assert made.read("0" * 64, {**ABOUT, "prefix": "cd"}) is None, "of something else"
    assert [path.name[3] for path in files(tmp_path)] == ["2", "3"]
    assert (tmp_path / "notes.safetensors").exists()
