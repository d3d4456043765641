"""Flags of ``aioengine serve`` that make it a fleet."""

from __future__ import annotations

from aioengine.cli.flags import EngineFlags
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set, given
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.fleet.config import FleetConfig

ELSEWHERE = {
    "engine": "the top of the file",
    "adapters": "[adapters]",
    "otlp_endpoint": "[server]",
    "served_model_names": "[server], as served_model_name",
    "server": "[server]",
}
"""Fields of FleetConfig that a server has from other tables."""


@flag_set(
    "Server",
    5,
    FieldsOf(
        FleetConfig,
        only=(
            *("replicas", "router", "placement", "autoscale"),
            *("cpus_per_replica", "migration_limit", "registry"),
        ),
    ),
    shown=("replicas",),
)
class FleetFlags(Flags):
    app_name: str | None = None
    """Name of the Serve application (aioengine)."""

    def fleet_config(
        self,
        config: EngineConfig,
        adapters: dict[str, str],
        flags: EngineFlags,
        otlp_endpoint: str | None = None,
    ) -> FleetConfig | None:
        """Return the table ``[fleet]`` of the file, overridden by the flags. None if there is neither: one
        engine in this process. Raises ConfigError."""
        table, own = flags.table("fleet"), given(self)
        if table is None:
            if not own:
                return None
            if self.replicas is None:
                raise ConfigError(f"--{next(iter(own)).replace('_', '-')}: needs a fleet; add --replicas")
        for name in ELSEWHERE.keys() & (table or {}).keys():
            raise ConfigError(
                f"{flags.config}, table fleet: `aioengine serve` reads {name} from {ELSEWHERE[name]}"
            )
        if self.app_name is not None:
            own["name"] = own.pop("app_name")
        values = {**(table or {}), "otlp_endpoint": otlp_endpoint, **own}
        source = "flags" if flags.config is None else f"{flags.config} and flags"
        return FleetConfig.from_table(config, adapters, values, source=source)
