"""Context of every route: the engine, the settings, and what is made of them once; and a request on its way
to a route's function."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sized
from functools import cached_property
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from aioengine import FilesystemResolver
from aioengine.adapters.read_threads import SharedRead, start_read
from aioengine.adapters.resolvers.sources import NAME_RULE, source_below
from aioengine.guided import Guide
from aioengine.metrics.page.plumbing import Receive, Scope
from aioengine.request import Wanted
from aioengine.runtime.client import EngineClient
from aioengine.runtime.text_work import EACH
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import BODIES, NUMBERS, UPLOADS, Shares
from aioengine.server.errors import ApiError, invalid, model_not_found
from aioengine.server.formats.calls import AnswerFormats
from aioengine.server.openai.api import ModelFields, SamplingDefaults, read_sampling_defaults
from aioengine.server.settings import ServerSettings
from aioengine.server.transport.body import JsonDecoder

if TYPE_CHECKING:
    from aioengine.metrics.asgi import MetricsApp
    from aioengine.model.text.tokenizer import Tokenizer

logger = logging.getLogger("aioengine.server")

_VERSION = re.compile(r"@([0-9]{1,18}|latest)$")
"""End of an adapter's name in requests for one of its versions."""


class Context:
    page: MetricsApp
    document: SharedRead[bytes]
    """The API's description; made on first use."""

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        self.engine = engine
        self.change(settings)
        lora = engine.config.lora
        self.adapter_root = root = None if lora is None else lora.adapter_root
        is_folder = root is not None and source_below(root, "", "any") is None
        self.folders = FilesystemResolver(root) if root is not None and is_folder else None
        """Finds adapters below the adapter root, if that is a folder. Raises ConfigError if it is none."""
        self.created, self.made = int(time.time()), time.monotonic()
        self.numbers = Shares(NUMBERS)
        """Log-probabilities, and numbers of vectors, that open requests hold or will hold."""
        self.open_requests: set[RequestRecord] = set()
        """Open requests, without probes and pages."""
        self.idle = asyncio.Event()
        """Set while there are none."""
        self.idle.set()
        self.bodies, self.uploads = Shares(BODIES), Shares(UPLOADS)
        self.decoder = JsonDecoder(ignores_unknown=settings.ignore_unknown_fields)
        self.draining = False
        """Whether new requests are refused; set by whoever runs the server."""
        self.seeds = _drawn_seeds((engine.config.seed or None) if settings.seed is None else settings.seed)
        self._draw = random.Random().getrandbits  # SystemRandom releases the GIL at each call
        self._defaults: SamplingDefaults | None = None

    def change(self, settings: ServerSettings) -> None:
        """Use other settings from now on. No key is held, only their hashes are, by the gate."""
        self.settings = msgspec.structs.replace(settings, api_keys={}, admin_keys={})
        self.model_names = tuple(settings.served_model_names) or (self.engine.config.model_name,)
        self.engine.model_name = self.model_names[0]

    @contextlib.contextmanager
    def opened(self, record: RequestRecord) -> Iterator[None]:
        """Context in which a request is open."""
        self.open_requests.add(record)
        self.idle.clear()
        try:
            yield
        finally:
            self.open_requests.discard(record)
            record.so_far = int  # the record may live on; its function would keep the answer in memory
            if not self.open_requests:
                self.idle.set()

    def new_id(self) -> str:
        """Return a new id, which is unique but no secret."""
        return f"{self._draw(128):032x}"

    async def defaults(self) -> SamplingDefaults:
        """Default sampling parameters. Raises ConfigError if they are not valid."""
        if self._defaults is None:
            self._defaults = await start_read("aioengine-defaults", self._read_defaults)
        return self._defaults

    def _read_defaults(self) -> SamplingDefaults:
        found = read_sampling_defaults(
            self.engine.model_path if self.settings.generation_config == "auto" else None
        )
        given = " ".join(f"{name}={value:g}" for name, value in msgspec.to_builtins(found).items())
        logger.info("defaults of requests, from generation_config.json: %s", given or "none")
        return found

    @property
    def stuck(self) -> bool:
        """Whether a step has run for longer than ``stuck_step_seconds``."""
        engine = self.engine
        runs = engine.state in ("running", "draining")
        return runs and engine.step_age() > self.settings.stuck_step_seconds

    @property
    def max_model_len(self) -> int:
        return self.engine.plan.max_model_len

    @property
    def max_body_bytes(self) -> int:
        """Bound on bodies; by default 64 bytes a token of the longest prompt, and 1 MiB for the rest."""
        return self.settings.max_body_bytes or 2**20 + 64 * self.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises ApiError if the model has none."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ApiError(400, f"{self.model_names[0]} has no tokenizer: it takes and gives token ids only")
        return tokenizer

    def token_bytes(self) -> Callable[[int], bytes]:
        """Return the table of token bytes, which stays valid for a request whatever happens to the engine."""
        tokenizer = self.engine.tokenizer
        return (lambda _token: b"") if tokenizer is None else tokenizer.token_bytes

    @cached_property
    def formats(self) -> AnswerFormats:
        """Return the formats of the model's answers. Raises ApiError if it has no tokenizer."""
        tokenizer, settings = self.tokenizer, self.settings
        names = settings.tool_call_parser, settings.reasoning_parser
        found = AnswerFormats.chosen(tokenizer.chat_template, *names, tokenizer.added_tokens)
        logger.info("formats of answers: tools=%s reasoning=%s", *found[:2])
        return found

    def cache_salt(self, tenant: str | None, asked: str | None) -> str | None:
        """Combine the tenant and the requested salt, as JSON: no client can make another tenant's salt."""
        owner = None if self.settings.share_prefix_cache else tenant
        return None if owner is None and asked is None else msgspec.json.encode((owner, asked)).decode()

    @cached_property
    def guide(self) -> Guide:
        """The guide. Raises ConfigError if guided decoding is not available."""
        return Guide(self.engine)


class Call(NamedTuple):
    """A request on its way to a route's function."""

    context: Context
    record: RequestRecord
    scope: Scope
    receive: Receive

    def adapter_of(self, model: str, field: str = "model") -> str | None:
        """Return the adapter that the request's ``field`` names; None for the base model.

        If its key may not use it, raises the same ApiError as for an unknown model, without checking whether
        it exists.
        """
        context = self.context
        names_base = model == context.engine.config.model and not context.settings.served_model_names
        adapter = None if names_base or model in context.model_names else model
        name = None if adapter is None else _VERSION.sub("", adapter)
        # Any text, however long, would be logged as the adapter's name.
        known = name is None or NAME_RULE.fullmatch(name) is not None
        if not known or not self.record.may_use(name):
            raise model_not_found(model[:300], field)
        return adapter

    def wanted_adapter(self, fields: ModelFields) -> Wanted:
        """Return the adapter or the mix that the request asks for, and note its name. Raises ApiError if its
        key may not use it, or if ``model`` is not the base model of a mix."""
        record, mix = self.record, fields.adapters
        record.adapter = adapter = self.adapter_of(fields.model)
        if mix is None:
            return adapter
        if adapter is not None:
            base = self.context.model_names[0]
            raise invalid("adapters", f"with this field, model must be the base model's name ({base})")
        record.named_in = "adapters"
        for name in mix:
            if self.adapter_of(name, "adapters") is None:
                raise invalid("adapters", f"{name!r} is the base model; name adapters only")
        record.adapter = "+".join(sorted(mix))[:255]
        return mix


class Sent(NamedTuple):
    """An answer in one piece."""

    body: bytes
    status: int = 200
    kind: bytes = b"application/json"


def sent(value: Any) -> Sent:
    """Return the answer that is ``value``: a text, or what is encoded to JSON."""
    if isinstance(value, Sent):
        return value
    if isinstance(value, str):
        return Sent(value.encode(), kind=b"text/plain; charset=utf-8")
    return Sent(msgspec.json.encode(value))


async def listing(call: Call, found: Sized, make: Callable[[], object]) -> Sent:
    """Answer with ``make()``, a list of what was ``found``, of which there may be thousands: beside the loop,
    in turns with other requests."""
    work = call.context.engine.text_work
    return await work.run(EACH * len(found), lambda: sent(make()), call.record.owner)


def _drawn_seeds(seed: int | None) -> Iterator[int]:
    """Draw the seeds of requests that have none from ``seed``; None: from a random one. Who knows some of
    them, but not ``seed``, cannot tell others."""
    key = secrets.token_bytes(16) if seed is None else seed.to_bytes(8, "big")
    for number in count():
        digest = blake2b(number.to_bytes(8, "big"), key=key, digest_size=8).digest()
        yield int.from_bytes(digest, "big") >> 1
