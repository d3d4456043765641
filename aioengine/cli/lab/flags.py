"""Flags of the lab's commands: the fields of a workload and of an experiment."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cyclopts import Group, Parameter

from aioengine.checks import read_json
from aioengine.cli.help import FOLDED
from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from aioengine.lab.runs.experiment import Experiment
    from aioengine.lab.workload.spec import WorkloadSpec

Number = TypeVar("Number", int, float)

_WORKLOAD = Group("Workload", sort_key=5)
_SYSTEM = Group("Engine", sort_key=6)
_MORE_WORKLOAD = Parameter(group=Group(f"{FOLDED} of the workload", sort_key=25))
_MORE_SYSTEM = Parameter(group=Group(f"{FOLDED} of the engine", sort_key=26))


@Parameter(name="*", group=_WORKLOAD)
@dataclass(frozen=True, kw_only=True)
class WorkloadFlags:
    """Fields of WorkloadSpec; None: as in --experiment, or the field's default."""

    trace: str | None = None
    """Azure LLM trace (CSV), JSON lines, or a recording of --record; .gz too."""
    arrivals: str | None = None
    """poisson:rate=2, gamma:rate=2,cv=4, onoff:rate=2,on=10,off=30 or diurnal:rate=2."""
    limit: int | None = None
    """Maximum number of requests."""
    adapters: int | None = None
    """Adapters to spread requests over (0: only the base model, or as in the trace)."""
    popularity: str | None = None
    """uniform, zipf:1.0, power:0.5, shift:1.0, drift:1.0, flip:1.0 or tenant."""
    ranks: str | None = None
    """Ranks of the adapters: 16, or with shares 8:0.5,16:0.3,64:0.2."""
    tenants: int | None = None
    """Tenants to spread requests over."""

    sessions: Annotated[str | None, _MORE_WORKLOAD] = None
    """Each arrival begins a session: chat:turns=5,think=10 or agents:turns=5,think=0.5,branch=4."""
    shared_prefix: Annotated[str | None, _MORE_WORKLOAD] = None
    """Common beginning of prompts, in groups: tokens:1024,groups=8,alpha=1."""
    concurrency: Annotated[int | None, _MORE_WORKLOAD] = None
    """Number of callers that send a request when the one before has ended (a closed loop)."""
    think: Annotated[float | None, _MORE_WORKLOAD] = None
    """Seconds between a caller's requests in a closed loop (0)."""
    tenant_bursts: Annotated[str | None, _MORE_WORKLOAD] = None
    """Bursts of single tenants: bursts:factor=5,on=10,off=60."""
    seconds: Annotated[float | None, _MORE_WORKLOAD] = None
    """Latest arrival of a request."""
    repeat: Annotated[bool | None, _MORE_WORKLOAD] = None
    """Repeat a trace from its beginning, up to --limit or --seconds."""
    base_share: Annotated[float | None, _MORE_WORKLOAD] = None
    """Share of the requests that are for the base model (0)."""
    tenant_shares: Annotated[str | None, _MORE_WORKLOAD] = None
    """uniform, zipf:1.0, or a weight for each tenant: 3,1,1."""
    priority: Annotated[str | None, _MORE_WORKLOAD] = None
    """Priorities with their shares: 0:0.9,5:0.1."""
    adapter_bytes: Annotated[str | None, _MORE_WORKLOAD] = None
    """Size of an adapter: 64MiB, uniform:8MiB..64MiB or lognormal:median=2e7,sigma=0.5."""
    prompt_tokens: Annotated[str | None, _MORE_WORKLOAD] = None
    """128, uniform:8..512, lognormal:median=200,sigma=0.8, or trace."""
    output_tokens: Annotated[str | None, _MORE_WORKLOAD] = None
    """The same for outputs."""
    max_prompt: Annotated[int | None, _MORE_WORKLOAD] = None
    """Longer prompts are cut to this."""
    max_output: Annotated[int | None, _MORE_WORKLOAD] = None
    """Longer outputs are cut to this."""
    lengths: Annotated[str | None, _MORE_WORKLOAD] = None
    """What policies know about output lengths: known, hidden:max=4096 or predicted:error=0.5."""
    deadline: Annotated[str | None, _MORE_WORKLOAD] = None
    """Deadline of each request; the same form as --timeout."""
    timeout: Annotated[str | None, _MORE_WORKLOAD] = None
    """Seconds after which clients give up, or proportional:0.5+0.05 with seconds for each token."""
    slo: Annotated[str | None, _MORE_WORKLOAD] = None
    """Time in which requests should end (same form as --timeout); measured, not enforced."""


@Parameter(name="*", group=_SYSTEM)
@dataclass(frozen=True, kw_only=True)
class SystemFlags:
    """Fields of Experiment that describe the simulated engine."""

    preset: str | None = None
    """Cost model: a preset, a calibrated file, or MODEL@h100."""
    cpu_loras: int | None = None
    """Adapters in the CPU cache, those in slots included (64)."""
    max_lora_rank: int | None = None
    """Rank that every slot is sized for (64)."""
    replicas: int | None = None
    """Engines behind one door; without this flag, one engine and no door."""
    router: Annotated[str | None, _MORE_SYSTEM] = None
    """Name in aioengine policies, or my_router.py:MyRouter (affinity); several are compared: a,b."""
    placement: Annotated[str | None, _MORE_SYSTEM] = None
    """Which adapters should live on which replicas (none)."""
    autoscale: Annotated[str | None, _MORE_SYSTEM] = None
    """Number of replicas by the waiting work: waiting_work:least=1,most=4 (always --replicas)."""
    start_seconds: Annotated[float | None, _MORE_SYSTEM] = None
    """Seconds that a replica of --autoscale takes to start (30)."""
    report_delay: Annotated[float | None, _MORE_SYSTEM] = None
    """Seconds by which the router's knowledge is older than a message takes (0)."""
    faults: Annotated[str | None, _MORE_SYSTEM] = None
    """What happens to replicas, at which second: kill:2@60,start:2@90 (also cut, heal, drain)."""

    max_num_seqs: Annotated[int | None, _MORE_SYSTEM] = None
    """Maximum running requests (64)."""
    max_num_batched_tokens: Annotated[int | None, _MORE_SYSTEM] = None
    """Maximum tokens in one step (2048)."""
    max_model_len: Annotated[int | None, _MORE_SYSTEM] = None
    """Maximum prompt plus output, in tokens."""
    on_too_long: Annotated[str | None, _MORE_SYSTEM] = None
    """What to do with longer requests: reject, truncate (the prompt) or fail (reject)."""
    ageing: Annotated[bool | None, _MORE_SYSTEM] = None
    """Whether policies serve requests that have waited for max_wait first (yes)."""
    block_size: Annotated[int | None, _MORE_SYSTEM] = None
    """Tokens in a KV block (16)."""
    kv_cache_memory: Annotated[str | None, _MORE_SYSTEM] = None
    """Bytes, or text such as 2GiB; by default what the preset's device has free."""
    max_waiting: Annotated[int | None, _MORE_SYSTEM] = None
    """Bound on waiting requests; those beyond it are refused."""
    slot_memory: Annotated[str | None, _MORE_SYSTEM] = None
    """Bytes that all slots share, such as 2GiB; an adapter takes only what its rank needs."""
    max_cpu_lora_bytes: Annotated[str | None, _MORE_SYSTEM] = None
    """A second bound on the CPU cache."""
    max_concurrent_loads: Annotated[int | None, _MORE_SYSTEM] = None
    """Adapters that are read from disk at once (2)."""
    enable_prefix_caching: Annotated[bool | None, _MORE_SYSTEM] = None
    """Share the KV blocks of equal prefixes; see --shared-prefix and --sessions."""
    sample_seconds: Annotated[float | None, _MORE_SYSTEM] = None
    """Simulated time between two rows of samples.csv (1)."""


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
    from aioengine.lab.runs.experiment import Experiment, refuse_fleet

    values = _read(file)
    given = _given(own)
    asked = _given(vars(workload)) | ({"scale": given.pop("scale")} if "scale" in given else {})
    spec = values.get("workload") or {} if base is None else base.to_dict()
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{file}: workload={spec!r}: must be an object")
    given = {**_given(vars(system)), **given}
    values = {**values, **given, "workload": {**spec, **asked}}
    source = "flags" if file is None else f"{file} and flags" if asked or given else str(file)
    try:
        if values.get("replicas") is None:
            refuse_fleet(given)
        experiment = Experiment.from_dict(values, source=source)
        in_file = base is not None or (file is not None and file.suffix == ".toml")
        check_effect(experiment, {*given, *asked, *(set_fields(experiment.workload) if in_file else ())})
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


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


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
