"""A model's own sampling defaults, for requests that give none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from aioengine.errors import ConfigError

FILE_NAME = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a ``generation_config.json`` that are defaults of requests, as vLLM takes them. None is
    what the API has without such a file. ``do_sample`` is not looked at: a temperature of 0 is greedy."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1)] | None = None
    """Bound on the output of requests that give none."""

    def given(self) -> dict[str, Any]:
        """Return the defaults that the file contains."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}

    def bounded(self, max_tokens: int) -> int:
        """Limit the default ``max_tokens`` to ``max_new_tokens``."""
        return max_tokens if self.max_new_tokens is None else min(max_tokens, self.max_new_tokens)


def read_sampling_defaults(where: Path) -> SamplingDefaults:
    """Read the defaults from ``where``, a file or its folder. Raises ConfigError if it cannot be read, or a
    value is not valid."""
    path = where / FILE_NAME if where.is_dir() else where
    try:
        return msgspec.json.decode(path.read_bytes(), type=SamplingDefaults)
    except OSError as error:
        raise ConfigError(f"generation_config: {path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"generation_config: {path}: {error}; correct it, or set generation_config='none'"
        ) from error
