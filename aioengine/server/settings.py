"""Settings of a server: its limits and keys."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from aioengine.checks import AnySeconds, Count, check_fields
from aioengine.errors import ConfigError
from aioengine.grammars.schemas import SchemaOptions
from aioengine.server.formats.registry import REASONING, TOOLS, check_name

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\[\]:@/?#*\sA-Z]+)(:[0-9]+)?")


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
    allow_origins: Sequence[str] = ()
    """Origins of other sites whose pages may call the server, such as "https://chat.example". Pages of all
    others may not send anything, and cannot read an answer."""
    max_body_bytes: Count | None = None
    """Maximum bytes of a body; by default 1 MiB, and 64 bytes for each token of ``max_model_len``."""
    max_upload_bytes: Count | None = None
    """Maximum size of an uploaded adapter, packed and unpacked. None: none can be uploaded. What is uploaded
    is kept in memory, within ``LoRAConfig.max_held_lora_bytes``."""
    max_choices: Count = 128
    """Bound on prompts x n in one request."""
    share_prefix_cache: bool = False
    """Share the prefix cache between tenants, who can then find out what others have sent. A request's
    ``cached_tokens``, and how soon it is answered, tell whether another tenant has sent the same text."""
    generation_config: Annotated[str, Meta(min_length=1, extra={"is": "'auto', 'none' or a path"})] = "auto"
    """Sampling defaults: auto (the model's generation_config.json), none, or a path to one. They are those of
    ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty`` and ``max_tokens``; "none" is the
    API's own."""
    tool_call_parser: str = "auto"
    """Format in which the model calls tools: hermes, llama3, mistral, gemma, harmony or none. "auto" is the
    one that its chat template shows; "none" leaves calls in the text."""
    reasoning_parser: str = "auto"
    """Format of the model's reasoning: think, harmony or none. Answers have it in a field of its own; "auto"
    and "none" are as above."""
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
    send_timeout: AnySeconds = 60.0
    """Seconds in which a client has to read 16 KiB of its answers, or all of them; else it is disconnected.
    Other ASGI servers than aioengine's do not watch this: there it has to accept 64 KiB of a stream."""
    retry_after: Count = 1
    """Minimum ``Retry-After`` of answers 429 and 503, in seconds. If requests are refused because too many
    wait, it is the time to answer those at the rate of the last minute."""
    stuck_step_seconds: AnySeconds = 120.0
    """Seconds after which a step counts as stuck: /health then answers 503, and the watchdog is not fed."""
    reword: Callable[[str], str] | None = None
    """Rewrites the engine's error messages for clients. The messages name configuration fields as in Python
    ("LoRAConfig.max_lora_rank"); ``aioengine serve`` replaces these by its flags."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_name("tool_call_parser", self.tool_call_parser, TOOLS)
        check_name("reasoning_parser", self.reasoning_parser, REASONING)
        for origin in self.allow_origins:
            if _ORIGIN.fullmatch(origin) is None:
                raise ConfigError(
                    f"allow_origins: {origin!r} is no origin; write it as browsers do, such as "
                    "https://chat.example or http://localhost:3000: in lower case, and without a path"
                )
        if self.keys_file is not None and (self.api_keys or self.admin_keys):
            raise ConfigError("keys_file names all keys: put those of api_keys and admin_keys into it too")


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
