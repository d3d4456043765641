"""The whole configuration of a server, or of a fleet behind one: its flags, and their checks before anything
is started."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from cyclopts import Parameter
from msgspec import Meta

from aioengine.checks import check_value
from aioengine.cli.flags import EngineFlags, check_folders, in_flags
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set, given
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.grammars.schemas import SchemaOptions
from aioengine.metrics.otlp import check_endpoint
from aioengine.server.settings import SERVER_FIELDS, ListenSettings, ServerSettings, settings_from
from aioengine.server.transport.tls import Certificate

SERVER_DEFAULTS = {"max_waiting": 1024, "max_waiting_tokens": 2**20, "policy": "fair"}
"""Bounds of a server on requests that wait, and its policy, where the configuration has none."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

Keys = Annotated[list[str] | None, Parameter(metavar="[TENANT:]KEY")]


@flag_set(
    "Server",
    5,
    *(FieldsOf(part, only=tuple(SERVER_FIELDS)) for part in (ListenSettings, ServerSettings, SchemaOptions)),
    shown=(
        *("host", "port", "served_model_name", "api_key", "keys", "allowed_host"),
        *("grace_seconds", "drain_delay", "log_format"),
    ),
    defaults=True,
)
class ServerFlags(Flags):
    served_model_name: list[str] | None = None
    """The base model's name in requests; repeatable."""
    api_key: Keys = None
    """Require a key; repeatable. Other users of this machine can see it: prefer --keys, or the variable
    AIOENGINE_API_KEYS."""
    keys: Path | None = None
    """File with keys, scopes and limits; see aioengine keys --help."""
    allowed_host: list[str] | None = None
    """Accepted Host header. Without keys, on a loopback address: localhost."""
    grace_seconds: float = 30.0
    """Seconds in which accepted requests may finish after SIGTERM."""
    drain_delay: float = 0.0
    """Seconds after SIGTERM in which /ready answers 503 while requests are still accepted."""
    log_format: Literal["text", "json"] = "text"
    """Format of the request log on standard error."""

    keep_dead: bool = False
    """Keep answering 503 when the engine is dead; by default the process exits with status 1."""
    admin_key: Keys = None
    """Key that may also load and unload adapters; other keys then may not. Repeatable; or set
    AIOENGINE_ADMIN_KEYS."""
    allow_origin: list[str] | None = None
    """Origin of another site whose pages may call the server, such as https://chat.example; repeatable."""
    trusted_proxy: list[str] | None = None
    """Address or network of a proxy whose X-Forwarded-For is trusted; repeatable."""
    lenient_schemas: bool = True
    """Accept schemas with uniqueItems, unknown formats and overlapping oneOf without enforcing these; the
    answer's header x-not-enforced and the log list them. Otherwise such schemas are refused."""
    tls_cert: Path | None = None
    """PEM file with the certificate and its chain, to serve HTTPS; SIGHUP reads it again."""
    tls_key: Path | None = None
    """PEM file with the certificate's key."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector for traces of requests, such as http://localhost:4318."""

    def settings(self) -> ServerSettings:
        """Return the server's settings. Raises ConfigError."""
        if self.otlp_endpoint is not None:
            check_endpoint(self.otlp_endpoint)
        found = settings_from(vars(self))
        hosts = self._allowed_hosts(bool(found.api_keys) or found.keys_file is not None)
        return msgspec.structs.replace(found, allowed_hosts=hosts, reword=in_flags)

    def listen_settings(self) -> ListenSettings:
        """Return the settings of the listening socket, with the certificate. Raises ConfigError."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert, --tls-key: give both, or neither")
        if find_spec("uvicorn") is None:
            raise ConfigError("serve needs more packages: pip install 'aioengine[server]'")
        return ListenSettings(
            trusted_proxies=self.trusted_proxy or (),
            tls=None if self.tls_cert is None else Certificate(str(self.tls_cert), str(self.tls_key)),
            **given(self, ListenSettings),
        )

    def _allowed_hosts(self, has_keys: bool) -> Sequence[str]:
        given = self.allowed_host or []
        if "*" in given or (not given and (has_keys or not is_loopback(self.host))):
            return ()
        return given or (*_LOCAL_NAMES, self.host)


ELSEWHERE = {
    "engine": "the top of the file",
    "adapters": "[adapters]",
    "otlp_endpoint": "[server]",
    "server": "[server]",
}
"""Settings of a fleet that a server has from other tables."""


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


class Checked(NamedTuple):
    """A whole configuration after its checks."""

    flags: ServerFlags
    config: EngineConfig
    adapters: dict[str, str]
    settings: ServerSettings
    listen: ListenSettings
    replicas: FleetConfig | None
    """None: one engine in this process."""


def server_config(flags: EngineFlags) -> EngineConfig:
    """Return the configuration of a server: where the file and the flags say nothing, waiting requests have
    bounds, and tenants equal shares. Raises ConfigError."""
    values, source = flags.settings()
    return EngineConfig.from_dict({**SERVER_DEFAULTS, **values}, source=source)


def check_all(
    server: ServerFlags = ServerFlags(), engine: EngineFlags = EngineFlags(), fleet: FleetFlags = FleetFlags()
) -> Checked:
    """Check everything that can be known before anything is started. Raises ConfigError."""
    for name, seconds in (("--grace-seconds", server.grace_seconds), ("--drain-delay", server.drain_delay)):
        check_value(name, seconds, Annotated[float, Meta(ge=0)])
    settings = msgspec.structs.replace(server.settings(), seed=engine.settings()[0].get("seed"))
    config, adapters = server_config(engine), engine.adapters()
    check_folders(adapters)
    for name in settings.served_model_names or (config.model_name,):
        if name in adapters:
            raise ConfigError(f"--lora-modules: {name!r} is the base model's name in requests; use another")
    replicas = fleet.fleet_config(config, adapters, engine, server.otlp_endpoint)
    return Checked(server, config, adapters, settings, server.listen_settings(), replicas)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
