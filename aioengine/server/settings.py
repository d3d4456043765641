"""Settings of a server: its limits, keys and address, and how flags and files give them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.checks import AnySeconds, Count, Seconds, check_fields, from_plain, nearest
from aioengine.config import refuse_removed
from aioengine.errors import ConfigError
from aioengine.grammars.schemas import SchemaOptions
from aioengine.server.access.keys import read_keys_file
from aioengine.server.transport.tls import Certificate

_IS_ORIGIN = (
    "an origin as browsers write it: in lower case, without a path, such as https://chat.example:8080"
)
_ORIGIN = r"\A[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\[\]:@/?#*\sA-Z]+)(:[0-9]+)?\Z"
Origin = Annotated[str, Meta(pattern=_ORIGIN, extra={"is": _IS_ORIGIN})]


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and keys of one server. An invalid value raises ConfigError."""

    served_model_names: Sequence[Annotated[str, Meta(min_length=1)]] = ()
    """Names of the base model in requests; the first is the one in answers. Empty: the engine's
    ``config.model``."""
    api_keys: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Key -> tenant. Empty: no key is required. See :func:`parse_keys`."""
    admin_keys: Mapping[str, str] = msgspec.field(default_factory=dict)
    """Key -> tenant. Only these may load and unload adapters; they may also do all that ``api_keys`` may.
    Empty: every client may."""
    keys_file: str | None = None
    """A TOML file with the hash, tenant, scopes, adapters and limits of each key, in place of ``api_keys``
    and ``admin_keys``; it is read again when it changes. See :mod:`aioengine.server.access.keys`."""
    allowed_hosts: Sequence[str] = ()
    """Host names that requests may be addressed to; empty: any. A web page can have its own name resolved
    to this machine and then read from a server that only this machine reaches (DNS rebinding); it cannot
    have another name in the request."""
    allow_origins: Sequence[Origin] = ()
    """Origins of other sites whose pages may call the server, such as "https://chat.example". Pages of all
    others may not send anything, and cannot read an answer."""
    max_body_bytes: Count | None = None
    """Maximum bytes of a body; by default 1 MiB, and 64 bytes for each token of ``max_model_len``."""
    max_upload_bytes: Count | None = None
    """Maximum size of an uploaded adapter. None: none can be uploaded. What is uploaded is kept in memory,
    within ``LoRAConfig.max_held_lora_bytes``."""
    max_choices: Count = 128
    """Bound on prompts x n in one request."""
    share_prefix_cache: bool = False
    """Share the prefix cache between tenants, who can then find out what others have sent. A request's
    ``cached_tokens``, and how soon it is answered, tell whether another tenant has sent the same text."""
    generation_config: Literal["auto", "none"] = "auto"
    """Sampling defaults: auto (the model's generation_config.json) or none. They are those of
    ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty`` and ``max_tokens``; "none" is the
    API's own."""
    tool_call_parser: Literal["auto", "none", "hermes", "llama3", "mistral", "harmony"] = "auto"
    """Format in which the model calls tools. "auto" is the one that its chat template shows; "none" leaves
    calls in the text."""
    reasoning_parser: Literal["auto", "none", "think", "harmony"] = "auto"
    """Format of the model's reasoning. Answers have it in a field of its own; "auto" and "none" are as
    above."""
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    """Requests without a seed draw theirs from this one. None: from the engine's if that is not 0, or else
    from a random one, so that nobody can tell what is drawn for others."""
    default_max_tokens: Count | None = None
    """Maximum tokens of chat requests that give none; None: as many as the context has room for."""
    ignore_unknown_fields: bool = False
    """Ignore unknown fields of requests, which are refused otherwise; each name is logged once."""
    schemas: SchemaOptions = SchemaOptions()
    """Defaults of how JSON schemas are read and JSON is written."""
    request_timeout: AnySeconds | None = 600.0
    """Maximum seconds from arrival to the end of a generation; None, or as a flag 0: no bound."""
    read_timeout: AnySeconds = 30.0
    """Maximum seconds between two parts of a request's body."""
    stuck_step_seconds: AnySeconds = 120.0
    """Seconds after which a step counts as stuck: /health then answers 503, and the watchdog is not fed."""
    reword: Callable[[str], str] | None = None
    """Rewrites the engine's error messages for clients. The messages name configuration fields as in Python
    ("LoRAConfig.max_lora_rank"); ``aioengine serve`` replaces these by its flags."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keys_file is not None and (self.api_keys or self.admin_keys):
            raise ConfigError("keys_file names all keys: put those of api_keys and admin_keys into it too")


class ListenSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Address of a server, and the limits of a connection; times are in seconds."""

    host: str = "127.0.0.1"
    """Address to listen on, such as 0.0.0.0, which is all addresses."""
    port: int = 8000
    """Port to listen on, where 0 chooses a free one."""
    trusted_proxies: Sequence[str] = ()
    """Addresses and networks of proxies. A request from one of them counts for the client that its
    ``X-Forwarded-For`` names; from other senders that header is ignored."""
    max_connections: Count = 4096
    """Maximum open connections; further ones are answered with 503 (with TLS: closed)."""
    header_timeout: Seconds = 10.0
    """Maximum seconds for a request's headers to arrive, and before them for a TLS handshake."""
    keep_alive: Seconds = 75.0
    """Maximum seconds that a connection may be idle."""
    send_timeout: Seconds = 60.0
    """Seconds after which a client is cut off that leaves unread what is kept for it, if that is much."""
    tls: Certificate | None = None
    """Serve HTTPS with this certificate; None: plain HTTP, as behind a proxy that does TLS."""

    def __post_init__(self) -> None:
        check_fields(self)
        for proxy in self.trusted_proxies:
            try:
                ip_network(proxy)
            except ValueError as error:
                raise ConfigError(f"trusted_proxies: {proxy!r} is no address or network: {error}") from error


def parse_keys(entries: Sequence[str], *, source: str) -> dict[str, str]:
    """Parse ``KEY`` or ``TENANT:KEY`` to key -> tenant.

    A key without a tenant gets one made from the key's digest, so that metrics and logs can distinguish
    tenants without holding keys. Raises ConfigError, which names ``source`` and never the key.
    """
    keys: dict[str, str] = {}
    for entry in entries:
        tenant, colon, key = entry.strip().rpartition(":")
        if not key or (colon and not tenant) or any(c.isspace() or not c.isprintable() for c in key):
            raise ConfigError(f"{source}: an API key must be KEY or TENANT:KEY, without spaces in KEY")
        if keys.get(key, tenant) != tenant:
            raise ConfigError(f"{source}: one API key is given to two tenants")
        keys[key] = tenant or f"key-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return keys


# Settings as flags and the table ``[server]`` of a configuration file give them

KEY_VARIABLE = "AIOENGINE_API_KEYS"
ADMIN_KEY_VARIABLE = "AIOENGINE_ADMIN_KEYS"

_LISTENING = {*ListenSettings.__struct_fields__} - {"tls", "trusted_proxies"}
_LISTENING |= {"tls_cert", "tls_key", "trusted_proxy", "otlp_endpoint"}
_LISTENING |= {"grace_seconds", "drain_delay", "keep_dead", "log_format"}
"""Fields that concern the process which listens, and not its answers."""
_RENAMED = {
    "served_model_name": "served_model_names",
    "allowed_host": "allowed_hosts",
    "allow_origin": "allow_origins",
    "keys": "keys_file",
    "api_key": "api_keys",
    "admin_key": "admin_keys",
}
"""Fields of ServerSettings, by their names here."""
_SCHEMAS = {"open_objects": "open_objects", "any_whitespace": "any_whitespace", "lenient_schemas": "lenient"}
"""Fields of SchemaOptions, by their names here."""
_SAME = {*ServerSettings.__struct_fields__} - {*_RENAMED.values(), "schemas", "reword", "seed"}
"""Fields that ServerSettings has under the same name."""
SERVER_FIELDS = frozenset((*_LISTENING, *_SAME, *_RENAMED, *_SCHEMAS))
"""Fields of the table: the flags of ``aioengine serve``, with underscores."""


def refuse_unknown_fields(table: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError, with the nearest name, if the table has a field that it cannot have."""
    refuse_removed(table, f"{source}: [server] ")
    for name in table:
        if name not in SERVER_FIELDS:
            near = nearest(name, SERVER_FIELDS)
            raise ConfigError(
                f"{source}: [server] has no field {name!r}{near}; see aioengine serve --help-all"
            )


def settings_from(values: Mapping[str, Any]) -> ServerSettings:
    """Return the settings that these fields give; those that are left out have their defaults. Fields of the
    process that listens are ignored. Reads the files of keys. Raises ConfigError."""
    keys_file = values.get("keys")
    if keys_file is not None:  # check now, and not after the model has been loaded
        if not isinstance(keys_file, (str, Path)):
            raise ConfigError(f"[server] keys={keys_file!r}: must be the path of a file")
        read_keys_file(Path(keys_file))
    given = {_RENAMED.get(name, name): values[name] for name in (*_SAME, *_RENAMED) if name in values}
    given |= {
        "api_keys": _keys("api-key", values.get("api_key"), KEY_VARIABLE),
        "admin_keys": _keys("admin-key", values.get("admin_key"), ADMIN_KEY_VARIABLE),
        "keys_file": None if keys_file is None else str(keys_file),
        "schemas": {ours: values[name] for name, ours in _SCHEMAS.items() if name in values},
        "request_timeout": values.get("request_timeout", ServerSettings().request_timeout) or None,
    }
    if not given["admin_keys"] and len(tenants := set(given["api_keys"].values())) > 1:
        raise ConfigError(
            f"--api-key: there are keys of {len(tenants)} tenants, each of which could replace the others' "
            "adapters: give --admin-key (only its key may change adapters), or --keys FILE"
        )
    for name in ("served_model_names", "allowed_hosts", "allow_origins"):
        texts = given.pop(name, None)
        if texts is not None and (name != "allowed_hosts" or "*" not in texts):
            given[name] = [texts] if isinstance(texts, str) else texts
    return from_plain(ServerSettings, given, "[server]", strict=False)


def _keys(flag: str, given: object, variable: str) -> Mapping[str, str]:
    """Return key -> tenant, from a flag and a variable together. Raises ConfigError."""
    entries = [given] if isinstance(given, str) else given or ()
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(f"--{flag}: must be a text, or a list of texts")
    keys = parse_keys(entries, source=f"--{flag}")
    return keys | parse_keys(os.environ.get(variable, "").split(), source=variable)
