"""Experiment: everything that a simulated run depends on, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from aioengine.checks import LARGEST, AnySeconds, Whole, check_fields, from_plain, read_json, refuse_unknown
from aioengine.config import EngineConfig, LoRAConfig, refuse_removed
from aioengine.errors import ConfigError
from aioengine.lab.fleet.conditions import parse_faults
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.requests import Workload
from aioengine.lab.workload.spec import WorkloadSpec
from aioengine.schedulers.routing import (
    DEFAULT_PLACEMENT,
    DEFAULT_ROUTER,
    load_autoscaler,
    load_placement,
    load_router,
)

MAX_REPLICAS = 1024
"""All engines of a fleet are simulated in one process."""
OnTooLong = Literal["reject", "truncate", "fail"]
Policy = str | dict[str, Any]
"""Policy, as in ``EngineConfig.policy``."""


def policy_label(policy: Policy) -> str:
    """Return a policy's name in results: its text, or its table as JSON."""
    return policy if isinstance(policy, str) else json.dumps(policy, sort_keys=True)


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run: the same experiment gives the same files, byte for byte.

    Raises ConfigError on construction if a value is out of range.
    """

    workload: WorkloadSpec
    policy: Policy = "fcfs"
    """Policy, as in ``EngineConfig.policy``; in the lab "oracle", and any policy or part whose constructor
    takes ``future``, is given the arrivals to come."""
    preset: str = "llama3-8b-h100"
    """A cost model that comes with aioengine, or the path of one that ``lab calibrate`` has written."""
    slots: int = 8
    """Adapter slots on the device (``max_loras``)."""
    cpu_loras: int = 64
    """Adapters in the CPU cache, those in slots included (``max_cpu_loras``)."""
    max_lora_rank: int = 64
    """Rank that every slot is sized for; requests for adapters of a higher rank fail."""
    slot_memory: int | str | None = None
    """Bytes that the slots share, whatever their number; None: each is sized for ``max_lora_rank``."""
    max_cpu_lora_bytes: int | str | None = None
    max_concurrent_loads: int = 2
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory: int | str | None = None
    """Memory for the KV cache, such as 2GiB; None: what the preset's device has free."""
    enable_prefix_caching: bool = False
    """Share the KV blocks of equal prefixes. Prompts have common ones only with ``shared_prefix`` or
    ``sessions``, or in traces that say so."""
    on_too_long: OnTooLong = "reject"
    """Treatment of requests whose prompt and output are longer than the model's context: the engine gets them
    as they are (it refuses a prompt that does not fit and ends an output where the context ends), or their
    prompts are cut until they fit, or the run is refused with a ConfigError before it begins."""
    ageing: bool = True
    """Whether policies serve a request out of turn when it has waited for ``max_wait``. Without this, orders
    differ more clearly, and requests may starve."""
    max_waiting: int | None = None
    seed: Whole = 0
    """Seed of the workload: arrivals, adapters, lengths."""
    sample_seconds: AnySeconds = 1.0
    """Simulated seconds between two rows of samples.csv."""
    replicas: Annotated[int, Meta(ge=1, le=MAX_REPLICAS)] | None = None
    """Engines behind one gateway; each is as the fields above say. None: one engine and no gateway."""
    router: str | None = None
    """Router, which chooses the replica for a request; see :mod:`aioengine.schedulers.registry`. This
    and the fields below are None without ``replicas``; in a fleet they get the values of ``OF_A_FLEET``."""
    placement: str | None = None
    """Which adapters should live on which replicas."""
    autoscale: str | None = None
    """Scaling policy by name, with its bounds ("waiting_work:least=1,most=4"); ``replicas`` are there at
    first. None: there are always as many."""
    start_seconds: AnySeconds | None = None
    """Seconds that an added replica takes to start."""
    report_delay: Annotated[float, Meta(ge=0, le=LARGEST)] | None = None
    """Seconds by which a router's knowledge of the replicas is older than a message takes."""
    faults: str | None = None
    """What happens to replicas, and when: "kill:2@60,start:2@90" ends the third one after 60 s of simulated
    time and starts it again, with empty caches, 30 s later. "cut" and "heal" are about its network; "drain"
    lets it finish its requests."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.replicas is None:
            refuse_fleet({name: getattr(self, name) for name in OF_A_FLEET})
        else:
            self._check_fleet(self.replicas)
        if self.slots > self.cpu_loras:
            raise ConfigError(
                f"cpu_loras={self.cpu_loras}: must be >= slots={self.slots}, because an adapter in a slot "
                "also stays in the CPU cache; raise cpu_loras or lower slots"
            )
        self.engine_config()

    def _check_fleet(self, replicas: int) -> None:
        """Check what is about a fleet, and set what was not given."""
        for name, value in OF_A_FLEET.items():
            if getattr(self, name) is None:
                msgspec.structs.force_setattr(self, name, value)
        parse_faults(self.faults or "", replicas)
        try:
            load_router(str(self.router))
            load_placement(str(self.placement))
            policy = None if self.autoscale is None else load_autoscaler(self.autoscale)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if policy is not None and not policy.least <= replicas <= policy.most:
            raise ConfigError(
                f"replicas={replicas}: must be within the bounds of autoscale={self.autoscale!r}, "
                f"which are {policy.least} and {policy.most}"
            )

    def open_workload(self, longest: int | None = None) -> Workload:
        """Open the workload, its requests cut to ``longest`` tokens. Raises ConfigError for an unusable
        trace, or an adapter that fits no slot."""
        workload = OfferedWorkload(self.workload, self.seed, longest=longest)
        largest = max(workload.adapters, key=lambda shape: shape.rank, default=None)
        if largest is not None and largest.rank > self.max_lora_rank:
            raise ConfigError(
                f"max_lora_rank={self.max_lora_rank}: adapter {largest.name!r} has rank {largest.rank} "
                f"(ranks={self.workload.ranks!r}), and all its requests would fail; raise max_lora_rank"
            )
        return workload

    def engine_config(self) -> EngineConfig:
        """Return the configuration of the simulated engine."""
        of_engine = (
            *("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "kv_cache_memory"),
            *("enable_prefix_caching", "seed", "max_waiting", "policy"),
        )
        of_lora = ("max_lora_rank", "slot_memory", "max_cpu_lora_bytes", "max_concurrent_loads")
        lora = LoRAConfig(
            max_loras=self.slots,
            max_cpu_loras=self.cpu_loras,
            **{name: getattr(self, name) for name in of_lora},
        )
        engine = {name: getattr(self, name) for name in of_engine}
        return EngineConfig(model=self.preset, lora=lora, **engine)

    def to_dict(self) -> dict[str, Any]:
        """Return the experiment as plain data, with defaults filled in."""
        values = msgspec.to_builtins(self)
        assert isinstance(values, dict)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "experiment") -> Self:
        """Make an experiment from plain data. Raises ConfigError, which names ``source`` and the field.

        Without replicas, values that fleets have by default are left out: experiments were once written with
        them.
        """
        refuse_removed(values, f"{source}: ")
        if values.get("replicas") is None:
            values = {n: v for n, v in values.items() if n not in OF_A_FLEET or v != OF_A_FLEET[n]}
        workload = values.get("workload")
        if isinstance(workload, Mapping):
            refuse_unknown(WorkloadSpec, workload, f"{source}, workload")
        return from_plain(cls, values, source)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read ``experiment.json`` of a run, or a JSON file with the fields of this struct."""
        values = read_json(path)
        inner = values.get("experiment")
        return cls.from_dict(inner if isinstance(inner, dict) else values, source=str(path))


OF_A_FLEET: Mapping[str, Any] = {
    "router": DEFAULT_ROUTER,
    "placement": DEFAULT_PLACEMENT,
    "autoscale": None,
    "start_seconds": 30.0,
    "report_delay": 0.0,
    "faults": None,
}
"""Fields that mean something only with replicas, and their values where a fleet does not say."""


def refuse_fleet(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first of these values, of an experiment without replicas, that is about a
    fleet."""
    for name in OF_A_FLEET:
        if (value := values.get(name)) is not None:
            raise ConfigError(f"{name}={value!r}: is for a fleet; give replicas")
