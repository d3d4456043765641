"""FleetConfig: the settings of a fleet, which are checked before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Meta

from aioengine.adapters.resolvers.sources import NAME_RULE, NAME_RULE_TEXT
from aioengine.checks import LARGEST, Count, Seconds, Whole, check_fields, from_plain, read_toml
from aioengine.config import EngineConfig, refuse_removed
from aioengine.errors import ConfigError
from aioengine.memory_plan import resolve_device
from aioengine.metrics.otlp import check_endpoint
from aioengine.schedulers.routing import load_autoscaler, load_placement, load_router

CONFIG_VARIABLE = "AIOENGINE_CONFIG"


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fleet of ``replicas`` engines of one configuration.

    In a TOML file the engine's fields are at the top, as in ``EngineConfig.from_toml``. The fleet's fields
    are in the table ``[fleet]``, and ``[adapters]`` has a line ``name = "path"`` for each adapter.
    ``[server]`` has the flags of ``aioengine serve``; a gateway that Serve runs takes those that concern its
    answers.

    Raises ConfigError on construction if a value is out of range, or there is no such router.
    """

    engine: EngineConfig
    replicas: Count = 1
    """Engines behind one server, on Ray. It is the one at RAY_ADDRESS, or is started here."""
    router: str = "affinity"
    """Routing policy, as ``aioengine policies`` lists them."""
    placement: str = "none"
    """Placement policy, which brings adapters to replicas before requests need them."""
    autoscale: str | None = None
    """Scaling policy, with its bounds: waiting_work:least=1,most=4. ``replicas`` is then the number at the
    start. None: the number does not change."""
    adapters: dict[str, str] = {}
    """Name -> path of the adapters that every replica knows from its start."""
    server: dict[str, Any] = {}
    """The table ``[server]``, for a gateway that Serve runs; ``aioengine serve`` has its own."""
    name: str = "aioengine"
    """Name of the Serve application."""
    cpus_per_replica: Count = 1
    """Processors and threads of each replica."""
    migration_limit: Whole = 3
    """How often a request that has begun may lose its replica and continue on another one."""
    replay: bool | None = None
    """Whether a request that continues on another replica decodes its delivered tokens again, so that it has
    the same last bits. None: in any dtype except float32. Batch-invariant replicas (``batch_invariant``) need
    no replay, and never do one."""
    heartbeat_seconds: Seconds = 0.5
    """Longest time between two reports of a replica."""
    silent_seconds: Seconds = 2.75
    """A replica without a report for longer gets no requests, and its requests continue on others."""
    step_seconds: Seconds = 120.0
    """A replica whose model takes longer for one step counts as hung."""
    replica_wait_seconds: Annotated[float, Meta(ge=0, le=LARGEST)] = 30.0
    """How long a request waits for a replica when there is none."""
    placement_seconds: Seconds = 5.0
    """Seconds between two plans of ``placement``."""
    otlp_endpoint: str | None = None
    """URL of the OpenTelemetry collector for the spans of gateways and replicas; None: the one that
    OpenTelemetry's variables name, if any."""
    registry: str | None = None
    """Folder (any fsspec URL) where the registry of adapters is kept, so that it outlives Ray's head."""

    def __post_init__(self) -> None:
        if not isinstance(self.engine, EngineConfig):
            raise ConfigError(f"engine={self.engine!r}: must be an EngineConfig")
        check_fields(self)
        if self.silent_seconds < 2 * self.heartbeat_seconds:
            raise ConfigError(
                f"silent_seconds={self.silent_seconds}: must be at least two heartbeats "
                f"(heartbeat_seconds={self.heartbeat_seconds})"
            )
        for field, text in (("name", self.name), ("registry", self.registry)):
            if text == "":
                raise ConfigError(f"{field}='': must not be empty")
            if text is not None and not is_utf8(text):
                raise ConfigError(f"{field}={text!a}: must be UTF-8")
        for name, path in self.adapters.items():
            if NAME_RULE.fullmatch(name) is None or not path:
                raise ConfigError(
                    f"adapters.{name!a}={path!a}: a name is {NAME_RULE_TEXT}; a path is not empty"
                )
            if not is_utf8(path):
                raise ConfigError(f"adapters.{name}: the path {path!a} is no UTF-8; rename the folder")
        if self.otlp_endpoint is not None:
            check_endpoint(self.otlp_endpoint)
        try:
            load_router(self.router)
            load_placement(self.placement)
            if self.autoscale is not None:
                load_autoscaler(self.autoscale)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if not max(self.bounds[0], 1) <= self.replicas <= self.bounds[1]:
            least, most = self.bounds
            raise ConfigError(
                f"replicas={self.replicas}: must be within the bounds of autoscale={self.autoscale!r}, "
                f"which are {least} and {most}, and at least 1 at first"
            )

    @property
    def bounds(self) -> tuple[int, int]:
        """Minimum and maximum number of replicas."""
        if self.autoscale is None:
            return self.replicas, self.replicas
        policy = load_autoscaler(self.autoscale)
        return policy.least, policy.most

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that a replica asks Ray for, which shows it no others."""
        device = self.engine.device
        if device == "cpu" or (device == "auto" and resolve_device(device) == "cpu"):
            return 0
        # Ranks that are actors of Ray ask for their own.
        return 1 if self.engine.executor == "ray" else self.engine.tensor_parallel_size

    @property
    def replays(self) -> bool:
        """``replay`` with its default filled in."""
        return self.engine.dtype != "float32" if self.replay is None else self.replay

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Read a TOML file. Raises ConfigError."""
        return cls.from_dict(read_toml(path), source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "configuration") -> Self:
        """Build the configuration from plain data, as in a TOML file. Raises ConfigError."""
        tables: dict[str, Mapping[str, Any]] = {}
        for name in ("fleet", "adapters", "server"):
            table = tables[name] = values.get(name, {})
            if not isinstance(table, Mapping):
                raise ConfigError(f"{source}: {name}={table!r}: must be a table [{name}]")
        engine = {key: value for key, value in values.items() if key not in tables}
        fleet = dict(tables["fleet"])
        if tables["server"]:
            from aioengine.server.settings import refuse_unknown_fields  # replicas do without the server

            refuse_unknown_fields(tables["server"], source)
            fleet["server"] = dict(tables["server"])
            fleet.setdefault("otlp_endpoint", tables["server"].get("otlp_endpoint"))
        engine.setdefault("policy", "fair")  # as with ``aioengine serve``
        built = EngineConfig.from_dict(engine, source=source)
        return cls.from_table(built, tables["adapters"], fleet, source=source)

    @classmethod
    def from_table(
        cls, engine: EngineConfig, adapters: Mapping[str, str], fleet: Mapping[str, Any], *, source: str
    ) -> Self:
        """From the fields of ``[fleet]``. Raises ConfigError."""
        refuse_removed(fleet, f"{source}, table fleet: ")
        values = {"engine": engine, "adapters": dict(adapters), **fleet}
        return from_plain(cls, values, f"{source}, table fleet")

    @classmethod
    def from_environment(cls) -> Self:
        """Read the file that ``AIOENGINE_CONFIG`` names. Raises ConfigError."""
        path = os.environ.get(CONFIG_VARIABLE)
        if not path:
            raise ConfigError(
                f"{CONFIG_VARIABLE} is not set: it must name a TOML file with the fields of EngineConfig, "
                "and a table [fleet]"
            )
        return cls.from_toml(path)


def is_utf8(text: str) -> bool:
    """Whether messages can hold a text. Python has paths that they cannot, of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
