"""Whatever is in an adapter's folder: reading it ends soon, takes little, and says shortly what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.machine import slowness
from support.peft_files import CONFIG, PREFIX, WEIGHTS, edit_config, read

from aioengine.adapters.peft.read import KnownPlans
from aioengine.errors import AdapterError, AdapterInvalid, AdapterLoadError


def refusal(folder: Path, **options: Any) -> AdapterError:
    """Reads what is bad, which takes little time. How much memory it takes, and whether others are held up,
    is measured in ``tests/attacks``."""
    began = time.thread_time()
    with pytest.raises(AdapterError) as caught:
        read(folder, **options)
    assert time.thread_time() - began < 2 * slowness()
    assert len(str(caught.value).encode()) <= 2000
    return caught.value


def write_header(folder: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data)


# Headers


@pytest.mark.parametrize("dims", [9, 300, 20_000, 45_000])
def test_a_tensor_of_many_dimensions(adapter: Path, dims: int) -> None:
    write_header(adapter, {"a": {"dtype": "F32", "shape": [2**48] * dims, "data_offsets": [0, 0]}})
    assert isinstance(refusal(adapter), AdapterInvalid)


@pytest.mark.parametrize(
    "header",
    [
        {"a" * 900_000: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F" * 900_000, "shape": [2], "data_offsets": [0, 8]}},
        {f"k{i}": 0 for i in range(80_000)},
        b"[" * 1_000_000,
        b'{"a":' * 150_000,
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 900_000 + b"]}}",
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":[' + b"[]," * 300_000 + b"[]]}}",
        b"\xff" * 1000,
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
    ids=range(9),
)
@pytest.mark.slow
def test_a_header_that_is_large_in_some_way(adapter: Path, header: object) -> None:
    write_header(adapter, header, bytes(8))
    assert isinstance(refusal(adapter), AdapterInvalid)


def test_a_header_longer_than_any_adapters_is_not_read(adapter: Path) -> None:
    with open(adapter / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate(1 << 31)
    assert "header" in str(refusal(adapter))


# Sizes that do not agree


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("change", [8 << 30, 3, 1])
def test_more_data_than_the_header_says(adapter: Path, known: bool, change: int) -> None:
    contents: dict[str, KnownPlans] = {"known": {}} if known else {}
    read(adapter, **contents)
    os.truncate(adapter / WEIGHTS, (adapter / WEIGHTS).stat().st_size + change)
    assert "malformed" in str(refusal(adapter, **contents))


# What is opened is what is looked at


@pytest.mark.parametrize("make_other", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_pipe_or_a_device_is_not_read(adapter: Path, file: str, make_other: Callable[[Path], None]) -> None:
    """Even if it took the place of a file after somebody looked."""
    (adapter / file).unlink()
    make_other(adapter / file)
    error = refusal(adapter)
    assert isinstance(error, AdapterLoadError) and "not a regular file" in str(error)


# Configurations


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "LORA", "runtime_config": [' + "[]," * 1_400_000 + "[]]}",
        '{"peft_type": "LORA", "runtime_config": [' + "[]," * 80_000 + '[]], "r": 4}',
        '{"peft_type": ' + "[" * 200_000,
        '{"peft_type": "' + "A" * 200_000 + '"}',
        '{"peft_type": {}}',
        '{"peft_type": "LORA", "r": ' + "9" * 4000 + "}",
        '{"peft_type": "LORA", "r": ' + "9" * 200_000 + "}",
        '{"peft_type": "LORA", "init_lora_weights": []}',
        '{"peft_type": "LORA", "init_lora_weights": [1]}',
        '{"peft_type": "LORA", "' + "\\ud800" * 20 + '": 1}',
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {'
        + ",".join(f'"k{i}":4' for i in range(15_000))
        + "}}",
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {'
        + ",".join(f'"(.?){{99}}k{i}":4' for i in range(9_000))
        + "}}",
    ],
    ids=range(12),
)
@pytest.mark.slow
def test_a_configuration_that_is_large_in_some_way(adapter: Path, text: str) -> None:
    (adapter / CONFIG).write_text(text)
    assert isinstance(refusal(adapter), AdapterInvalid)


CATASTROPHIC = [
    "(a+)+b",
    "(.*a|.*)*x",
    "(.*.*)*x",
    "((.?){99}){9}x",
    "(q|q)*!",
    "(.*)*(.*)*(.*)*!",
    "(.?.?)*" * 140,
]


@pytest.mark.parametrize("pattern", CATASTROPHIC, ids=range(len(CATASTROPHIC)))
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_patterns_match_in_linear_time(adapter: Path, field: str, pattern: str) -> None:
    """They match nothing, or are refused; either way it is soon over."""
    value: Any = {pattern: 3} if field.endswith("_pattern") and field != "layers_pattern" else pattern
    fields = {field: value} | ({"layers_to_transform": [0]} if field == "layers_pattern" else {})
    edit_config(adapter, **fields)
    began = time.thread_time()
    read_or_refuse(adapter)
    assert time.thread_time() - began < 2 * slowness()


def read_or_refuse(folder: Path, **options: Any) -> None:
    try:
        read(folder, **options)
    except AdapterError as error:
        message = str(error)
        assert len(message.encode()) <= 2000 and str(folder) in message


# Anything

names = (
    st.sampled_from([f"{PREFIX}.lora_A.weight", f"{PREFIX}.lora_B.weight", "lm_head.weight", "x"]) | st.text()
)
numbers = st.integers(-1, 40) | st.sampled_from([2**31, 2**48, 2**63, 2**64, 10**400]) | st.floats()
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", ""]) | anything,
        "shape": st.lists(st.sampled_from([4, 32, 0, 2**48, -1]), max_size=12) | anything,
        "data_offsets": st.tuples(st.sampled_from([0, 512]), st.sampled_from([512, 1024])) | anything,
    }
)
FIELDS = [
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "bias", "lora_bias", "use_dora"),
    *("init_lora_weights", "modules_to_save", "ensure_weight_tying", "loftq_config", "new_field"),
    *("trainable_token_indices", "alora_invocation_tokens"),
]


@settings(max_examples=150, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(FIELDS), anything | st.text(max_size=30), max_size=3))
@pytest.mark.slow
def test_any_configuration_is_read_or_refused(saved: Path, fields: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(saved, Path(name) / "sql"))
        content = json.loads((folder / CONFIG).read_text()) | fields
        (folder / CONFIG).write_text(json.dumps(content))
        read_or_refuse(folder)


@settings(max_examples=100, deadline=None)
@given(
    header=st.dictionaries(names, entries | anything, max_size=4),
    size=st.sampled_from([0, 1, 512, 1024, 1 << 20]),
    length=st.none() | st.integers(0, 2**64 - 1),
)
@pytest.mark.slow
def test_any_header_is_refused(saved: Path, header: dict[str, Any], size: int, length: int | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(saved, Path(name) / "sql"))
        raw = json.dumps(header).encode()
        count = len(raw) if length is None else length
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", count) + raw + bytes(size))
        with pytest.raises(AdapterError) as caught:
            read(folder)
        assert len(str(caught.value).encode()) <= 2000
