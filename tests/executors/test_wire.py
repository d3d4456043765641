"""Messages between an engine and its workers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine import errors
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.executors.process import wire
from aioengine.executors.process.wire import Failed, Request, Start, WorkerError, frame
from aioengine.request import TokenLogprob
from aioengine.step import Sampled, StepResult


def returned(error: BaseException) -> Exception:
    """What becomes of an error that a worker reports."""
    report = wire.reports.decode(frame(Failed(1, wire.pack_error(error)))[8:])
    assert isinstance(report, Failed)
    return wire.unpack_error(report.error)


@given(
    kind=st.sampled_from([errors.AdapterInvalid, errors.AdapterTooLarge, errors.AdapterLoadError]),
    reason=st.text(),
    name=st.text(),
    path=st.none() | st.text(),
    transient=st.booleans(),
)
def test_adapter_errors_come_back_as_they_were(
    kind: type[errors.AdapterError], reason: str, name: str, path: str | None, transient: bool
) -> None:
    more = {"transient": transient} if kind is errors.AdapterLoadError else {}
    error = kind(reason, name=name, path=path, **more)
    again = returned(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_other_errors_keep_their_type_in_the_text_and_their_trace() -> None:
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        again = returned(error)
    assert isinstance(again, WorkerError)
    assert str(again) == "ZeroDivisionError: by zero"
    assert "raise ZeroDivisionError" in again.__notes__[0]
    assert str(returned(KeyboardInterrupt())) == "KeyboardInterrupt"

    class ConfigError(Exception):
        """Not the package's."""

    assert isinstance(returned(ConfigError("x")), WorkerError)
    config = returned(errors.ConfigError("does not fit"))
    assert type(config) is errors.ConfigError and str(config) == "does not fit"


def test_a_configuration_arrives_whole() -> None:
    config = EngineConfig(
        model="/m", kv_cache_memory="1GiB", lora=LoRAConfig(target_modules=["q_proj"], max_loras=7)
    )
    start = Request(0, Start(config, "/somewhere"))
    assert wire.requests.decode(frame(start)[8:]) == start
    bare = Request(0, Start(EngineConfig(model="/m", lora=None), ""))
    assert wire.requests.decode(frame(bare)[8:]) == bare


@pytest.mark.parametrize("cut", [1, 7, 10**6])
def test_messages_arrive_whole_however_they_are_cut(cut: int) -> None:
    logprob = TokenLogprob(3, -0.25, ((3, -0.25), (4, -1.0)))
    result = StepResult.of([[Sampled(3, logprob)], [], [Sampled(-1, error="no")]])
    result = result._replace(seconds=[0.5], ends=[])
    data = frame(wire.answer(9, result)) + frame(Failed(None, b"x" * 1000)) + frame(Failed(1, b""))[:-1]
    frames, got = wire.Frames(), []
    for start in range(0, len(data), cut):
        got += map(wire.reports.decode, frames.feed(data[start : start + cut]))
    answer, broken = got
    assert isinstance(answer, wire.Answer) and answer.number == 9
    assert msgspec.msgpack.decode(answer.value, type=StepResult) == result
    assert broken == Failed(None, b"x" * 1000)
