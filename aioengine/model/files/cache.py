"""The folder for files that are made or fetched, and the name of the model that is made there."""

from __future__ import annotations

import os
from pathlib import Path

EMBEDDED_MODEL = "smollm2-135m"
"""The name that stands for the embedded model in ``EngineConfig.model``."""


def cache_root() -> Path:
    """Return the folder for what can be made or fetched again: ``$XDG_CACHE_HOME/aioengine``."""
    # The XDG base directory specification: a relative value is to be ignored.
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "aioengine"
