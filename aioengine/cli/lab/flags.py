"""Flags of the lab's commands: the fields of a workload and of an experiment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cyclopts import Group, Parameter

from aioengine.checks import read_json
from aioengine.cli.help import FOLDED
from aioengine.cli.struct_flags import StructFlags, flags_of, given
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.workload.spec import WorkloadSpec

Number = TypeVar("Number", int, float)

_WORKLOAD = Group("Workload", sort_key=5)
_SYSTEM = Group("Engine", sort_key=6)


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
@flags_of(
    WorkloadSpec,
    group=_WORKLOAD,
    more=Group(f"{FOLDED} of the workload", sort_key=25),
    shown=("trace", "arrivals", "limit", "adapters", "popularity", "ranks", "tenants"),
    left_out=("scale",),
)
class WorkloadFlags(StructFlags):
    """Fields of WorkloadSpec; None: as in --experiment, or the field's default."""


@Parameter(name="*", group=_SYSTEM)
@dataclass(frozen=True, kw_only=True)
@flags_of(
    Experiment,
    group=_SYSTEM,
    more=Group(f"{FOLDED} of the engine", sort_key=26),
    shown=("preset", "cpu_loras", "max_lora_rank", "replicas"),
    left_out=("workload", "policy", "slots", "seed"),
    also=(EngineConfig, LoRAConfig),
)
class SystemFlags(StructFlags):
    """Fields of Experiment that describe the simulated engine."""


_NAMES = {"max_loras": "--slots", "max_cpu_loras": "--cpu-loras"}
"""Names of the lab's flags, by the engine's names of the fields."""


def make_experiment(
    file: Path | None,
    workload: WorkloadFlags,
    system: SystemFlags,
    own: Mapping[str, Any],
    base: WorkloadSpec | None = None,
) -> Experiment:
    """Make an experiment from ``file`` (an experiment, or that of a comparison), overridden by the given
    flags.

    Args:
        base: Workload in place of the file's.
        own: From the command's own flags: seed, policy, slots, and the workload's scale.

    Raises ConfigError for errors in the file or the flags, and for a flag that changes nothing.
    """
    from aioengine.lab.runs.effects import check_effect, set_fields
    from aioengine.lab.runs.experiment import refuse_fleet

    values = _read(file)
    asked = given(workload)
    if own.get("scale") is not None:
        asked["scale"] = own["scale"]
    spec = values.get("workload") or {} if base is None else base.to_dict()
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{file}: workload={spec!r}: must be an object")
    fields = given(system) | {k: v for k, v in own.items() if v is not None and k != "scale"}
    values = {**values, **fields, "workload": {**spec, **asked}}
    source = "flags" if file is None else f"{file} and flags" if asked or fields else str(file)
    try:
        if values.get("replicas") is None:
            refuse_fleet(fields)
        experiment = Experiment.from_dict(values, source=source)
        in_file = base is not None or (file is not None and file.suffix == ".toml")
        check_effect(experiment, {*fields, *asked, *(set_fields(experiment.workload) if in_file else ())})
        return experiment
    except ConfigError as error:
        raise ConfigError(_in_lab_flags(str(error))) from error


def _read(file: Path | None) -> Mapping[str, Any]:
    from aioengine.lab.workload.files import read_workload

    if file is None:
        return {}
    if file.suffix == ".toml":
        return {"workload": read_workload(file).to_dict()}
    values = read_json(file)
    for key in ("comparison", "experiment"):
        values = values.get(key, values)
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {key}={values!r}: must be an object")
    return values


def _in_lab_flags(text: str) -> str:
    return re.sub(r"(?:LoRAConfig\.)?\b(max_(?:cpu_)?loras)\b", lambda found: _NAMES[found[1]], text)


def check_out(out: Path, mark: str) -> None:
    """Raise ConfigError if the folder has files that no run made, because they might be overwritten.

    Args:
        mark: A file that shows that an earlier run used the folder.
    """
    try:
        foreign = out.exists() and any(out.iterdir()) and not (out / mark).exists()
    except NotADirectoryError as error:
        raise ConfigError(f"--out {out}: is a file") from error
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be used: {error.strerror}") from error
    if foreign:
        raise ConfigError(f"--out {out}: has files, but no {mark} of an earlier run; use another folder")


def jobs_of(given: int | None) -> int:
    """Return the number of parallel runs; by default as many as cores. Raises ConfigError."""
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if given < 1:
        raise ConfigError(f"--jobs {given}: must be at least 1")
    return given


def numbers(flag: str, texts: Iterable[str] | None, kind: type[Number]) -> list[Number] | None:
    """Parse "4,8,16", given once or several times; None if it was not given. Raises ConfigError."""
    if texts is None:
        return None
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        return [kind(part) for part in parts]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{flag} {','.join(parts)}: must be {what} with commas between them") from None
