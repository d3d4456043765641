"""The packages of the extra ``lab``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from aioengine.errors import ConfigError


@contextmanager
def needs_extra() -> Iterator[None]:
    """Turn an ImportError of the extra's packages into a ConfigError that says how to install them."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"the lab needs more packages: pip install 'aioengine[lab]' ({error})") from error
