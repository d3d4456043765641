"""Finds settings that change nothing in an experiment, so that commands can say so."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import msgspec

from aioengine.errors import ConfigError
from aioengine.lab.runs.experiment import Experiment
from aioengine.lab.workload import traces
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.popularity import Shift, parse_popularity
from aioengine.lab.workload.spec import WorkloadSpec


def check_effect(experiment: Experiment, given: Collection[str]) -> None:
    """Raise ConfigError for the first of the ``given`` fields, of an experiment or of its workload, that
    changes nothing in it.

    Bounds always count, whether or not they are reached: ``limit``, ``max_prompt``, ``cpu_loras``.
    """
    if experiment.autoscale is None:
        _refuse(experiment, given, ["start_seconds"], "no replica is added; give autoscale")
    check_workload_effect(experiment.workload, given)


def check_workload_effect(spec: WorkloadSpec, given: Collection[str]) -> None:
    """Raise ConfigError as ``check_effect`` does, for the fields of a workload alone."""
    for names, why in _without_effect(spec, given):
        _refuse(spec, given, names, why)


def set_fields(spec: WorkloadSpec) -> set[str]:
    """Return the fields that do not have their defaults."""
    return {
        field.name for field in msgspec.structs.fields(spec) if getattr(spec, field.name) != field.default
    }


def _without_effect(spec: WorkloadSpec, given: Collection[str]) -> Iterator[tuple[Collection[str], str]]:
    """Yield fields, each with the reason why they would change nothing."""
    closed = spec.concurrency is not None
    if not closed:
        yield ["think"], "is for a closed loop; give concurrency with it"
    if not spec.plays_trace and spec.repeat:
        yield ["repeat"], "there is no trace that is played to its end"
    if spec.trace is not None and not spec.plays_trace and spec.draws_lengths:
        yield ["trace"], "nothing is taken from it, because prompt_tokens and output_tokens are given"
    if not spec.tenants:
        yield ["tenant_shares"], "there are no tenants to spread requests over; give tenants"
    if not spec.adapters:
        yield ["popularity", "base_share"], "there are no adapters to spread requests over; give adapters"
        if {"ranks", "adapter_bytes"} & set(given) and not OfferedWorkload(spec, 0).adapters:
            yield ["ranks", "adapter_bytes"], "there are no adapters; give adapters"
    if not closed:
        return
    changing = bool(spec.adapters) and isinstance(parse_popularity("popularity", spec.popularity), Shift)
    timed = traces.has_times(str(spec.trace)) if spec.plays_trace else spec.arrivals is not None
    if not timed:
        why = "the requests of this closed loop have no times; give arrivals, or leave it out"
        yield ["scale", "seconds", "tenant_bursts", *["popularity"] * changing], why
    elif spec.seconds is None and not changing and spec.tenant_bursts is None:
        drawn = ["arrivals"] if spec.trace is None or spec.sessions is not None else []
        yield ["scale", *drawn], "in a closed loop, requests are sent when others have ended; leave it out"


def _refuse(
    settings: Experiment | WorkloadSpec, given: Collection[str], names: Collection[str], why: str
) -> None:
    for name in names:
        if name in given:
            raise ConfigError(f"{name}={getattr(settings, name)!r}: {why}")
