"""The packages of the extra ``lab``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from aioengine.errors import ConfigError


@contextmanager
def needs_extra() -> Iterator[None]:
    """Turn an ImportError of the extra's packages into a ConfigError that says how to install them."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"the lab needs more packages: pip install 'aioengine[lab]' ({error})") from error


def check_extra() -> None:
    """Raise ConfigError if one of the packages is missing, before anything long begins. Where there is no
    build of the one that draws figures, the lab does without: see :func:`can_draw`."""
    with needs_extra():
        import polars
        import scipy

        del polars, scipy


def can_draw() -> bool:
    """Whether figures can be drawn."""
    return find_spec("vl_convert") is not None


NO_REPORT = "there is no report, because vl-convert-python is missing: pip install 'aioengine[lab]'"
