"""The compiled CPU library at another instruction set than the best."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from aioengine.kernels.cpu import build, shared_library


@contextlib.contextmanager
def at_level(name: str) -> Iterator[None]:
    """Let everything use the library for this instruction set, or that with a stand-in for tile registers."""
    flags = {**build.levels(), **build.FOR_TESTS}[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "levels", lambda: {name: flags})
        shared_library.load.cache_clear()
        yield
    shared_library.load.cache_clear()
