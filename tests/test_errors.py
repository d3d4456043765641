"""Errors cross processes as they are."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from aioengine import errors

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.AioEngineError)]


def made(cls: type[errors.AioEngineError]) -> errors.AioEngineError:
    make: Any = cls
    if issubclass(cls, errors.AdapterError):
        return make("is gone", name="sql", path="/adapters/sql", transient=True)
    if cls is errors.PromptTooLong:
        return make(900, 500, at_least=True)
    if cls is errors.EngineOverloaded:
        return make("too many wait", bound="tenant")
    return make("it went wrong")


@pytest.mark.parametrize("cls", CLASSES)
def test_pickled_and_back(cls: type[errors.AioEngineError]) -> None:
    error = made(cls)
    error.add_note("seen on replica 3")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error) and again.args == error.args
    assert vars(again) == vars(error)


def test_every_class_is_tested() -> None:
    assert errors.PromptTooLong in CLASSES and len(CLASSES) >= 14
