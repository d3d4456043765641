"""Experiment: everything that a simulated run depends on, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from aioengine.checks import AnySeconds, Count, Whole, check_fields, from_plain, read_json, refuse_unknown
from aioengine.config import EngineConfig, LoRAConfig, refuse_removed
from aioengine.errors import ConfigError
from aioengine.lab.workload.draw import OfferedWorkload
from aioengine.lab.workload.requests import Workload
from aioengine.lab.workload.spec import WorkloadSpec, read_workload
from aioengine.schedulers.routing import DEFAULT_PLACEMENT, DEFAULT_ROUTER

if TYPE_CHECKING:
    from aioengine.fleet.config import FleetConfig

MAX_REPLICAS = 1024
"""All engines of a fleet are simulated in one process."""
OnTooLong = Literal["reject", "truncate", "fail"]
Policy = str | dict[str, Any]
"""Policy, as in ``EngineConfig.policy``."""


def policy_label(policy: Policy) -> str:
    """Return a policy's name in results: its text, or its table as JSON."""
    return policy if isinstance(policy, str) else json.dumps(policy, sort_keys=True)


OF_A_FLEET = ("router", "placement", "autoscale", "start_seconds")
"""Fields that mean something only with replicas."""


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run: the same experiment gives the same files, byte for byte.

    Raises ConfigError on construction if a value is out of range.
    """

    workload: WorkloadSpec
    policy: Policy = "fcfs"
    """Name in ``aioengine policies``, or my_policy.py:MyPolicy, or a table; "oracle", and any policy or part
    whose constructor takes ``future``, is given the arrivals to come."""
    preset: str = "llama3-8b-h100"
    """A cost model that comes with aioengine, or the path of one that ``lab calibrate`` has written."""
    slots: Count = 8
    """Adapter slots on the device (``max_loras``)."""
    cpu_loras: Count = 64
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
    max_waiting: int | None = None
    seed: Whole = 0
    """Seed of the workload: arrivals, adapters, lengths."""
    sample_seconds: AnySeconds = 1.0
    """Simulated seconds between two rows of samples.csv."""
    warmup: Annotated[float, Meta(ge=0)] | None = None
    """Seconds at the beginning that figures leave out, with what happens after the last arrival; 0 leaves out
    that end alone. None: nothing is left out."""
    replicas: Annotated[int, Meta(ge=1, le=MAX_REPLICAS)] | None = None
    """Engines behind one gateway; each is as the fields above say. None: one engine and no gateway."""
    router: str = DEFAULT_ROUTER
    """Router, which chooses the replica for a request; see :mod:`aioengine.schedulers.registry`."""
    placement: str = DEFAULT_PLACEMENT
    """Which adapters should live on which replicas."""
    autoscale: str | None = None
    """Scaling policy by name, with its bounds ("waiting_work:least=1,most=4"); ``replicas`` are there at
    first. None: there are always as many."""
    start_seconds: AnySeconds = 30.0
    """Seconds that an added replica takes to start."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.slots > self.cpu_loras:
            raise ConfigError(
                f"cpu_loras={self.cpu_loras}: must be >= slots={self.slots}, because an adapter in a slot "
                "also stays in the CPU cache; raise cpu_loras or lower slots"
            )
        if self.replicas is not None:
            self.fleet_config(self.replicas)
            return
        self.engine_config()
        for field in msgspec.structs.fields(type(self)):
            if field.name in OF_A_FLEET and (value := getattr(self, field.name)) != field.default:
                raise ConfigError(f"{field.name}={value!r}: is for a fleet; give replicas")

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
        own: dict[str, Any] = {"max_loras": self.slots, "max_cpu_loras": self.cpu_loras, "model": self.preset}
        own |= msgspec.structs.asdict(self)
        engine, lora = (
            {name: own[name] for name in kind.__struct_fields__ if name in own}
            for kind in (EngineConfig, LoRAConfig)
        )
        return EngineConfig(**engine, lora=LoRAConfig(**lora))

    def fleet_config(self, replicas: int) -> FleetConfig:
        """Return the configuration of a simulated fleet of these engines. Raises ConfigError."""
        from aioengine.fleet.config import FleetConfig

        return FleetConfig(
            engine=self.engine_config(),
            replicas=replicas,
            router=self.router,
            placement=self.placement,
            autoscale=self.autoscale,
            replay=False,
            step_seconds=1e9,  # none counts as hung
            replica_wait_seconds=30.0 + self.start_seconds,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "experiment") -> Self:
        """Make an experiment from plain data. Raises ConfigError, which names ``source`` and the field."""
        refuse_removed(values, f"{source}: ")
        workload = values.get("workload")
        if isinstance(workload, Mapping):
            refuse_unknown(WorkloadSpec, workload, f"{source}, workload")
        return from_plain(cls, values, source)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read an experiment; see :func:`read_values`."""
        return cls.from_dict(read_values(path), source=str(path))


def read_values(path: str | Path) -> dict[str, Any]:
    """Return the fields of an experiment in a file: in ``experiment.json`` of a run, ``comparison.json``, a
    JSON file that has these fields alone, or a TOML file with a workload. Raises ConfigError."""
    if Path(path).suffix == ".toml":
        return {"workload": msgspec.to_builtins(read_workload(path))}
    values = read_json(path)
    for key in ("comparison", "experiment"):
        values = values.get(key, values)
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {key}={values!r}: must be an object")
    return values
