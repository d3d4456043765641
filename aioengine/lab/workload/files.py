"""A workload in a file: TOML or JSON with the fields of :class:`WorkloadSpec`, or a trace alone."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aioengine.errors import ConfigError
from aioengine.lab.workload.spec import WorkloadSpec


def read_workload(path: str | Path) -> WorkloadSpec:
    """Return the workload that a file describes.

    ``.toml`` and ``.json`` hold the fields of :class:`WorkloadSpec`, at the top or in a table ``workload``
    (so an experiment.json will do); a trace that they name is looked for beside the file first. Anything else
    is a trace.

    Raises ConfigError, which begins with the path, if it cannot be read or a field is wrong.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        if not path.exists():
            raise ConfigError(f"workload {path}: there is no such file")
        if not path.is_file():
            raise ConfigError(f"workload {path}: is not a regular file, which can be read several times")
        return WorkloadSpec(trace=str(path))
    values = _read(path)
    for key in ("comparison", "experiment", "workload"):
        inner = values.get(key)
        if isinstance(inner, Mapping):
            values = inner
    values = dict(values)
    trace = values.get("trace")
    if isinstance(trace, str) and not Path(trace).is_absolute() and (path.parent / trace).is_file():
        values["trace"] = str(path.parent / trace)
    return WorkloadSpec.from_dict(values, source=f"workload {path}")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"workload {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # what tomllib and json raise, and UnicodeDecodeError
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise ConfigError(f"workload {path}: is not {kind}: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"workload {path}: must be a table of fields, not {type(values).__name__}")
    return values
