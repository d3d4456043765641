"""The names of models in requests, and which of them a key may use."""

from __future__ import annotations

import re

from aioengine.adapters.names import NAME_RULE
from aioengine.request import Wanted
from aioengine.server.access.auth import Identity
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.errors import invalid, model_not_found
from aioengine.server.openai.api import ModelFields

_VERSION = re.compile(r"@([0-9]{1,18}|latest)$")
"""End of an adapter's name in requests for one of its versions."""


def adapter_of(context: Context, model: str, identity: Identity, field: str = "model") -> str | None:
    """Return the adapter that a request's ``field`` names; None for the base model.

    If ``identity`` may not use it, raises the same ApiError as for an unknown model, without checking whether
    it exists.
    """
    names_base = model == context.engine.config.model and not context.settings.served_model_names
    adapter = None if names_base or model in context.model_names else model
    name = None if adapter is None else _VERSION.sub("", adapter)
    # Any text, however long, would be logged as the adapter's name.
    if (name is not None and NAME_RULE.fullmatch(name) is None) or not identity.models.allow(name):
        raise model_not_found(model[:300], field)
    return adapter


def wanted_adapter(context: Context, fields: ModelFields, record: RequestRecord) -> Wanted:
    """Return the adapter or the mix that a request asks for, and note its name. Raises ApiError if its key
    may not use it, or if ``model`` is not the base model of a mix."""
    record.adapter = adapter = adapter_of(context, fields.model, record.identity)
    record.wanted = (None if adapter is None else _VERSION.sub("", adapter),)
    mix = fields.adapters
    if mix is None:
        return adapter
    if adapter is not None:
        base = context.model_names[0]
        raise invalid("adapters", f"with this field, model must be the base model's name ({base})")
    if not mix:
        raise invalid("adapters", "is empty")
    record.named_in = "adapters"
    for name in mix:
        if adapter_of(context, name, record.identity, "adapters") is None:
            raise invalid("adapters", f"{name!r} is the base model; name adapters only")
    record.adapter = "+".join(sorted(mix))[:255]
    record.wanted = (None, *(_VERSION.sub("", name) for name in mix))
    return mix
