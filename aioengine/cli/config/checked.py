"""The whole configuration of a server: its flags, and their checks before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
from cyclopts import Group, Parameter

from aioengine.cli.flags import EngineFlags, check_folders, in_flags
from aioengine.cli.fleet.flags import FleetFlags
from aioengine.cli.help import FOLDED
from aioengine.cli.struct_flags import StructFlags, flags_of
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.metrics.otlp import check_endpoint
from aioengine.server.settings import ServerSettings
from aioengine.server.table import settings_from
from aioengine.server.transport.tls import Certificate

if TYPE_CHECKING:
    from aioengine.fleet.config import FleetConfig
    from aioengine.server.run import ListenSettings

SERVER_DEFAULTS = {"max_waiting": 1024, "max_waiting_tokens": 2**20, "policy": "fair"}
"""Bounds of a server on requests that wait, and its policy, where the configuration has none."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

_SERVER = Group("Server", sort_key=5)
_MORE = Group(f"{FOLDED} server flags", sort_key=25)
_IN_MORE = Parameter(group=_MORE)
_LIST = Parameter(negative="")
_KEY = Parameter(negative="", metavar="[TENANT:]KEY")
_MORE_LIST = Parameter(group=_MORE, negative="")
_MORE_KEY = Parameter(group=_MORE, negative="", metavar="[TENANT:]KEY")


@Parameter(name="*", group=_SERVER)
@dataclass(frozen=True, kw_only=True)
@flags_of(
    ServerSettings,
    group=_MORE,
    defaults=True,
    only=(
        *("max_body_bytes", "max_upload_bytes", "max_choices", "share_prefix_cache", "generation_config"),
        *("tool_call_parser", "reasoning_parser", "default_max_tokens", "ignore_unknown_fields"),
        *("request_timeout", "read_timeout", "send_timeout", "stuck_step_seconds"),
    ),
)
class ServerFlags(StructFlags):
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is all addresses."""
    port: int = 8000
    """Port to listen on; 0 chooses a free one."""
    served_model_name: Annotated[list[str] | None, _LIST] = None
    """The base model's name in requests; repeatable."""
    api_key: Annotated[list[str] | None, _KEY] = None
    """Require a key; repeatable. Other users of this machine can see it: prefer --keys."""
    keys: Path | None = None
    """File with keys, scopes and limits; see aioengine keys --help."""
    allowed_host: Annotated[list[str] | None, _LIST] = None
    """Accepted Host header. Without keys, on a loopback address: localhost."""
    grace_seconds: float = 30.0
    """Seconds in which accepted requests may finish after SIGTERM."""
    drain_delay: float = 0.0
    """Seconds after SIGTERM in which /ready answers 503 while requests are still accepted."""
    keep_dead: Annotated[bool, Parameter(group=_MORE, negative="")] = False
    """Keep answering 503 when the engine is dead; by default the process exits with status 1."""
    log_format: Literal["text", "json"] = "text"
    """Format of the request log on standard error."""

    api_key_file: Annotated[Path | None, _IN_MORE] = None
    """File with one key per line, as for --api-key; or set AIOENGINE_API_KEYS."""
    admin_key: Annotated[list[str] | None, _MORE_KEY] = None
    """Key that may also load and unload adapters; other keys then may not. Repeatable."""
    admin_key_file: Annotated[Path | None, _IN_MORE] = None
    """File with one admin key per line; or set AIOENGINE_ADMIN_KEYS."""
    allow_origin: Annotated[list[str] | None, _MORE_LIST] = None
    """Origin of another site whose pages may call the server, such as https://chat.example; repeatable."""
    trusted_proxy: Annotated[list[str] | None, _MORE_LIST] = None
    """Address or network of a proxy whose X-Forwarded-For is trusted; repeatable."""
    max_connections: Annotated[int, _IN_MORE] = 4096
    """Maximum open connections; further ones are answered with 503 (with TLS: closed)."""
    open_objects: Annotated[bool, _IN_MORE] = False
    """Allow properties in guided JSON that its schema does not declare; by default only where the schema has
    additionalProperties."""
    any_whitespace: Annotated[bool, _IN_MORE] = False
    """Allow white space in guided JSON; by default it is compact."""
    lenient_schemas: Annotated[bool, _IN_MORE] = True
    """Accept schemas with uniqueItems, unknown formats and overlapping oneOf without enforcing these; the
    answer's header x-not-enforced and the log list them. Otherwise such schemas are refused."""
    header_timeout: Annotated[float, _IN_MORE] = 10.0
    """Maximum seconds for a request's headers to arrive, and before them for a TLS handshake."""
    keep_alive: Annotated[float, _IN_MORE] = 75.0
    """Maximum seconds that a connection may be idle."""
    tls_cert: Annotated[Path | None, _IN_MORE] = None
    """PEM file with the certificate and its chain, to serve HTTPS; SIGHUP reads it again."""
    tls_key: Annotated[Path | None, _IN_MORE] = None
    """PEM file with the certificate's key."""
    otlp_endpoint: Annotated[str | None, _IN_MORE] = None
    """URL of an OpenTelemetry collector for traces of requests, such as http://localhost:4318."""

    def settings(self) -> ServerSettings:
        """Return the server's settings. Raises ConfigError."""
        if self.otlp_endpoint is not None:
            check_endpoint(self.otlp_endpoint)
        found = settings_from(vars(self))
        hosts = self._allowed_hosts(bool(found.api_keys) or found.keys_file is not None)
        return msgspec.structs.replace(found, allowed_hosts=hosts, reword=in_flags)

    def certificate(self) -> Certificate | None:
        """Read it. Raises ConfigError."""
        if self.tls_cert is None and self.tls_key is None:
            return None
        if self.tls_cert is None or self.tls_key is None:
            raise ConfigError("--tls-cert, --tls-key: give both, or neither")
        return Certificate(str(self.tls_cert), str(self.tls_key))

    def listen_settings(self, certificate: Certificate | None = None) -> ListenSettings:
        """Return the settings of the listening socket. Raises ConfigError."""
        from aioengine.server.run import ListenSettings

        return ListenSettings(
            host=self.host,
            port=self.port,
            trusted_proxies=self.trusted_proxy or (),
            max_connections=self.max_connections,
            header_timeout=self.header_timeout,
            keep_alive=self.keep_alive,
            tls=certificate,
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
    for flag, seconds in (("grace-seconds", flags.grace_seconds), ("drain-delay", flags.drain_delay)):
        if not seconds >= 0:
            raise ConfigError(f"--{flag} {seconds}: must be 0 or more")
    settings = msgspec.structs.replace(flags.settings(), seed=engine_flags.settings()[0].get("seed"))
    config = server_config(engine_flags)
    adapters = engine_flags.adapters()
    check_folders(adapters)
    for name in settings.served_model_names or (config.model_name,):
        if name in adapters:
            raise ConfigError(f"--lora-modules: {name!r} is the base model's name in requests; use another")
    replicas = (fleet or FleetFlags()).fleet_config(config, adapters, engine_flags, flags.otlp_endpoint)
    try:
        listen = flags.listen_settings(flags.certificate())
    except ImportError as error:
        raise ConfigError(f"serve needs more packages: pip install 'aioengine[server]' ({error})") from error
    return Checked(flags, config, adapters, settings, listen, replicas)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
