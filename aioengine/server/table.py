"""The server's settings as flags and the table ``[server]`` of a configuration file give them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aioengine.checks import from_plain, nearest
from aioengine.errors import ConfigError
from aioengine.server.access.keys import read_keys_file
from aioengine.server.settings import ServerSettings, parse_keys

KEY_VARIABLE = "AIOENGINE_API_KEYS"
ADMIN_KEY_VARIABLE = "AIOENGINE_ADMIN_KEYS"

_LISTENING = (
    *("host", "port", "tls_cert", "tls_key", "trusted_proxy", "max_connections", "header_timeout"),
    *("keep_alive", "grace_seconds", "drain_delay", "keep_dead", "log_format", "otlp_endpoint"),
)
"""Fields that concern the process which listens, and not its answers."""
_NOT_SAME = {"api_keys", "admin_keys", "keys_file", "schemas", "reword", "retry_after", "seed"}
_NOT_SAME |= {"served_model_names", "allowed_hosts", "allow_origins", "request_timeout"}
_SAME = tuple(name for name in ServerSettings.__struct_fields__ if name not in _NOT_SAME)
"""Fields that ServerSettings has under the same name."""
_SECRET = ("api_key", "admin_key")
_SCHEMAS = {"open_objects": "open_objects", "any_whitespace": "any_whitespace", "lenient_schemas": "lenient"}
"""Fields of SchemaOptions, by their names here."""
_LISTS = {
    "served_model_name": "served_model_names",
    "allowed_host": "allowed_hosts",
    "allow_origin": "allow_origins",
}
"""Fields of ServerSettings that are lists of texts, by their names here."""
_OTHERS = (
    *("keys", "request_timeout", "api_key", "api_key_file", "admin_key", "admin_key_file"),
    *(*_LISTS, *_SCHEMAS),
)
SERVER_FIELDS = frozenset((*_LISTENING, *_SAME, *_OTHERS))
"""Fields of the table: the flags of ``aioengine serve``, with underscores."""


def refuse_unknown_fields(table: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError, with the nearest name, if the table has a field that it cannot have."""
    for name in table:
        if name not in SERVER_FIELDS:
            near = nearest(name, SERVER_FIELDS)
            raise ConfigError(
                f"{source}: [server] has no field {name!r}{near}; see `aioengine config schema`"
            )


def settings_from(values: Mapping[str, Any]) -> ServerSettings:
    """Return the settings that these fields give; those that are left out have their defaults. Fields of the
    process that listens are ignored. Reads the files of keys. Raises ConfigError."""
    keys_file = values.get("keys")
    if keys_file is not None:  # check now, and not after the model has been loaded
        if not isinstance(keys_file, (str, Path)):
            raise ConfigError(f"[server] keys={keys_file!r}: must be the path of a file")
        read_keys_file(Path(keys_file))
    given = {name: values[name] for name in _SAME if name in values}
    given |= {
        "api_keys": _keys("api-key", values.get("api_key"), KEY_VARIABLE, values.get("api_key_file")),
        "admin_keys": _keys(
            "admin-key", values.get("admin_key"), ADMIN_KEY_VARIABLE, values.get("admin_key_file")
        ),
        "keys_file": None if keys_file is None else str(keys_file),
        "schemas": {ours: values[name] for name, ours in _SCHEMAS.items() if name in values},
    }
    if not given["admin_keys"] and len(tenants := set(given["api_keys"].values())) > 1:
        raise ConfigError(
            f"--api-key: there are keys of {len(tenants)} tenants, each of which could replace the others' "
            "adapters: give --admin-key (only its key may change adapters), or --keys FILE"
        )
    for field, ours in _LISTS.items():
        if texts := _texts(field, values.get(field)):
            given[ours] = texts
    if "*" in given.get("allowed_hosts", ()):
        del given["allowed_hosts"]
    if "request_timeout" in values:
        given["request_timeout"] = values["request_timeout"] or None
    return from_plain(ServerSettings, given, "[server]", strict=False)


def _texts(field: str, given: object) -> list[str]:
    """Return a list of texts, for which a file may give one text. Raises ConfigError."""
    found = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) for text in found):
        shown = "" if field in _SECRET else f"={given!r}"
        raise ConfigError(f"[server] {field}{shown}: must be a text, or a list of texts")
    return list(found)


def _keys(flag: str, given: object, variable: str, file: str | Path | None) -> Mapping[str, str]:
    """Return key -> tenant, from a flag, a variable and a file together. Raises ConfigError."""
    keys = parse_keys(_texts(flag.replace("-", "_"), given), source=f"--{flag}")
    keys |= parse_keys(os.environ.get(variable, "").split(), source=variable)
    if file is not None:
        source = f"--{flag}-file {file}"
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{source}: cannot be read: {error}") from error
        entries = [line for line in lines if line.strip() and not line.startswith("#")]
        if not entries:  # otherwise a file that was emptied by mistake would let everybody in
            raise ConfigError(f"{source}: has no key; remove the flag or add one")
        keys |= parse_keys(entries, source=source)
    return keys
