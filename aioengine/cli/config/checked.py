"""The whole configuration of a server: its flags, and their checks before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
from cyclopts import Parameter
from msgspec import Meta

from aioengine.checks import check_value
from aioengine.cli.flags import EngineFlags, check_folders, in_flags
from aioengine.cli.fleet.flags import FleetFlags
from aioengine.cli.struct_flags import FieldsOf, Flags, flag_set
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.grammars.schemas import SchemaOptions
from aioengine.metrics.otlp import check_endpoint
from aioengine.server.settings import SERVER_FIELDS, ServerSettings, settings_from
from aioengine.server.transport.tls import Certificate

if TYPE_CHECKING:
    from aioengine.fleet.config import FleetConfig
    from aioengine.server.run import ListenSettings

SERVER_DEFAULTS = {"max_waiting": 1024, "max_waiting_tokens": 2**20, "policy": "fair"}
"""Bounds of a server on requests that wait, and its policy, where the configuration has none."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

Keys = Annotated[list[str] | None, Parameter(metavar="[TENANT:]KEY")]


@flag_set(
    "Server",
    5,
    FieldsOf(ServerSettings, only=tuple(SERVER_FIELDS)),
    FieldsOf(SchemaOptions, only=("open_objects", "any_whitespace")),
    shown=(
        *("host", "port", "served_model_name", "api_key", "keys", "allowed_host"),
        *("grace_seconds", "drain_delay", "log_format"),
    ),
    defaults=True,
)
class ServerFlags(Flags):
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all addresses."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
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
    max_connections: int = 4096
    """Maximum open connections; further ones are answered with 503 (with TLS: closed)."""
    lenient_schemas: bool = True
    """Accept schemas with uniqueItems, unknown formats and overlapping oneOf without enforcing these; the
    answer's header x-not-enforced and the log list them. Otherwise such schemas are refused."""
    header_timeout: float = 10.0
    """Maximum seconds for a request's headers to arrive, and before them for a TLS handshake."""
    keep_alive: float = 75.0
    """Maximum seconds that a connection may be idle."""
    send_timeout: float = 60.0
    """Seconds after which a client is cut off that leaves unread what is kept for it, if that is much."""
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
        try:
            from aioengine.server.run import ListenSettings
        except ImportError as error:
            raise ConfigError(
                f"serve needs more packages: pip install 'aioengine[server]' ({error})"
            ) from error
        return ListenSettings(
            host=self.host,
            port=self.port,
            trusted_proxies=self.trusted_proxy or (),
            max_connections=self.max_connections,
            header_timeout=self.header_timeout,
            keep_alive=self.keep_alive,
            send_timeout=self.send_timeout,
            tls=None if self.tls_cert is None else Certificate(str(self.tls_cert), str(self.tls_key)),
        )

    def _allowed_hosts(self, has_keys: bool) -> Sequence[str]:
        given = self.allowed_host or []
        if "*" in given or (not given and (has_keys or not is_loopback(self.host))):
            return ()
        return given or (*_LOCAL_NAMES, self.host)


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
    server: ServerFlags | None, engine: EngineFlags | None, fleet: FleetFlags | None = None
) -> Checked:
    """Check everything that can be known before anything is started. Raises ConfigError."""
    flags, engine_flags = server or ServerFlags(), engine or EngineFlags()
    for name, seconds in (("--grace-seconds", flags.grace_seconds), ("--drain-delay", flags.drain_delay)):
        check_value(name, seconds, Annotated[float, Meta(ge=0)])
    settings = msgspec.structs.replace(flags.settings(), seed=engine_flags.settings()[0].get("seed"))
    config = server_config(engine_flags)
    adapters = engine_flags.adapters()
    check_folders(adapters)
    for name in settings.served_model_names or (config.model_name,):
        if name in adapters:
            raise ConfigError(f"--lora-modules: {name!r} is the base model's name in requests; use another")
    replicas = (fleet or FleetFlags()).fleet_config(config, adapters, engine_flags, flags.otlp_endpoint)
    return Checked(flags, config, adapters, settings, flags.listen_settings(), replicas)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
