"""Flags of the lab's commands: the fields of a workload and of an experiment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter, Token

from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.runs.experiment import Experiment, read_values
from aioengine.lab.workload.spec import WorkloadSpec


def _numbers(kind: Any, tokens: Sequence[Token]) -> list[float]:
    """Convert "4,8,16", given once or several times; "" has none."""
    of = int if "int" in str(kind) else float
    try:
        return [of(part) for token in tokens for part in token.value.split(",") if token.value]
    except ValueError:
        shown = ",".join(token.value for token in tokens)
        raise ValueError(f"{shown!r}: must be numbers with commas between them") from None


_SEVERAL = Parameter(converter=_numbers, metavar="A,B,...")
Ints = Annotated[list[int], _SEVERAL]
Floats = Annotated[list[float], _SEVERAL]


@flag_set(
    "Workload",
    5,
    FieldsOf(WorkloadSpec, left_out=("scale",)),
    shown=("trace", "arrivals", "limit", "adapters", "popularity", "ranks", "tenants"),
)
class WorkloadFlags(Flags):
    """Fields of WorkloadSpec; None: as in --experiment, or the field's default."""


@flag_set(
    "Engine",
    6,
    FieldsOf(Experiment, left_out=("workload", "policy", "slots", "seed"), also=(EngineConfig, LoRAConfig)),
    shown=("preset", "cpu_loras", "max_lora_rank", "replicas"),
)
class SystemFlags(Flags):
    """Fields of Experiment that describe the simulated engine."""


def make_experiment(
    file: Path | None, flags: Flags, base: WorkloadSpec | None = None, **own: Any
) -> Experiment:
    """Make an experiment from ``file`` (an experiment, or that of a comparison), overridden by the given
    flags, and these by ``own``. ``base`` is a workload in place of the file's.

    Raises ConfigError for errors in the file or the flags.
    """
    values = {} if file is None else read_values(file)
    spec = values.get("workload") or {} if base is None else msgspec.to_builtins(base)
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{file}: workload={spec!r}: must be an object")
    given = {name: value for name, value in {**vars(flags), **own}.items() if value is not None}
    fields, asked = (
        {name: given[name] for name in struct.__struct_fields__ if name in given and name != "workload"}
        for struct in (Experiment, WorkloadSpec)
    )
    source = "flags" if file is None else f"{file} and flags" if asked or fields else str(file)
    return Experiment.from_dict({**values, **fields, "workload": {**spec, **asked}}, source=source)


def check_out(out: Path, mark: str) -> None:
    """Raise ConfigError if the folder has files, but not ``mark``, which each run writes: they might be
    overwritten."""
    try:
        foreign = out.exists() and any(out.iterdir()) and not (out / mark).exists()
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be used: {error.strerror}") from error
    if foreign:
        raise ConfigError(f"--out {out}: has files, but no {mark} of an earlier run; use another folder")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
