"""A JSON file, or an object in one, with typed access. No torch here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from aioengine.checks import read_json
from aioengine.errors import ConfigError


class NotNative(ConfigError):
    """Error for a model that the native decoder does not run; transformers may run it."""


class ConfigFile:
    """A JSON object with typed access; every error names the file, the key and the value."""

    def __init__(self, path: Path, *, scope: str = "", raw: dict[str, Any] | None = None) -> None:
        self.path = path
        self.scope = scope
        if raw is None and not path.exists():
            raise ConfigError(f"{path}: no such file; a Hugging Face model folder must contain it")
        self.raw = read_json(path) if raw is None else raw
        self.defaults: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value; if the key is absent, the family's default, then ``default``."""
        return self.raw.get(key, self.defaults.get(key, default))

    def error(
        self, key: str, value: object, problem: str, kind: type[ConfigError] = ConfigError
    ) -> ConfigError:
        return kind(f"{self.path}: {self.scope}{key}={value!r}: {problem}")

    def number(self, key: str, *, default: float | None = None) -> float:
        """Return a finite number > 0; ``default`` stands in for an absent key and for null. Raises
        ConfigError."""
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.path}: {self.scope}{key} is missing; expected a number > 0")
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not ok or not math.isfinite(value) or value <= 0:
            raise self.error(key, value, "must be a number > 0")
        return float(value)

    def positive(self, key: str, *, default: int | None = None, most: int | None = None) -> int:
        """Return an integer > 0, and up to ``most``."""
        value = self.number(key, default=default)
        if value != int(value):
            raise self.error(key, value, "must be an integer")
        if most is not None and value > most:
            raise self.error(key, int(value), f"must be <= {most}")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return bool(value)
