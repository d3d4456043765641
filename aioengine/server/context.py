"""Context of every route: the engine, the settings, and what is made of them once; and a request on its way
to a route's function."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sized
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from aioengine.adapters.read_threads import SharedRead
from aioengine.guided import Guide
from aioengine.metrics.page.plumbing import Receive, Scope
from aioengine.runtime.client import EngineClient
from aioengine.runtime.requests.vectors import read_label_names
from aioengine.runtime.text_work import EACH, SHORT
from aioengine.server.access_log import RequestRecord
from aioengine.server.adapter_root import adapter_root
from aioengine.server.bounds import NUMBERS, Shares
from aioengine.server.errors import ApiError
from aioengine.server.formats.registry import AnswerFormats
from aioengine.server.openai.logprobs import TokenBytes
from aioengine.server.openai.sampling import SamplingDefaults, chosen_defaults, drawn_seeds
from aioengine.server.settings import ServerSettings
from aioengine.server.transport.turns import Starts

if TYPE_CHECKING:
    from aioengine.metrics.asgi import MetricsApp
    from aioengine.model.text.tokenizer import Tokenizer

logger = logging.getLogger("aioengine.server")


class Context:
    page: MetricsApp
    documents: SharedRead[tuple[bytes, bytes]]
    """The API's description, for programs and for people; made on first use."""

    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        self.engine = engine
        self.change(settings)
        self.adapter_root = adapter_root(engine.config.lora)
        self.created, self.made = int(time.time()), time.monotonic()
        self.numbers = Shares(NUMBERS)
        """Log-probabilities, and numbers of vectors, that open requests hold or will hold."""
        self.open_requests: set[RequestRecord] = set()
        """Open requests, without probes and pages."""
        self.starts = Starts(lambda: len(self.open_requests))
        self.draining = False
        """Whether new requests are refused; set by whoever runs the server."""
        self.seeds = drawn_seeds((engine.config.seed or None) if settings.seed is None else settings.seed)
        self.label_names = SharedRead("aioengine-labels", lambda: read_label_names(engine.model_path))
        """The model's ``id2label``; empty if it has none."""
        self._draw = random.Random().getrandbits  # SystemRandom releases the GIL at each call
        self._defaults: SamplingDefaults | None = None
        self._tools_noted = False

    def change(self, settings: ServerSettings) -> None:
        """Use other settings from now on."""
        self.settings = settings
        self._formats: AnswerFormats | None = None
        self.model_names = tuple(settings.served_model_names) or (self.engine.config.model_name,)
        self.engine.model_name = self.model_names[0]

    def new_id(self) -> str:
        """Return a new id, which is unique but no secret."""
        return f"{self._draw(128):032x}"

    async def defaults(self) -> SamplingDefaults:
        """Default sampling parameters. They are read once and logged. Raises ConfigError if they are not
        valid."""
        if self._defaults is None:
            wanted, model = self.settings.generation_config, self.engine.model_path
            self._defaults = await self.engine.text_work.run(
                SHORT + 1, lambda: chosen_defaults(wanted, model)
            )
            given = " ".join(f"{name}={value:g}" for name, value in self._defaults.given().items())
            logger.info("defaults of requests, from generation_config.json: %s", given or "none")
        return self._defaults

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

    def token_bytes(self) -> TokenBytes:
        """Return the table of token bytes, which stays valid for a request whatever happens to the engine."""
        tokenizer = self.engine.tokenizer
        return (lambda _token: b"") if tokenizer is None else tokenizer.token_bytes

    @property
    def formats(self) -> AnswerFormats:
        """Return the formats of the model's answers. Raises ApiError if it has no tokenizer."""
        if self._formats is None:
            tokenizer, settings = self.tokenizer, self.settings
            names = settings.tool_call_parser, settings.reasoning_parser
            self._formats = AnswerFormats.chosen(tokenizer.chat_template, *names, tokenizer.added_tokens)
            logger.info("formats of answers: tools=%s reasoning=%s", *self._formats[:2])
        return self._formats

    async def note_hidden_tools(self) -> None:
        """Warn once if the chat template does not show tools to the model."""
        if self._tools_noted:
            return
        self._tools_noted = True
        if not await self.engine.text_work.run(SHORT + 1, lambda: self.tokenizer.shows_tools):
            logger.warning(
                "the model's chat template does not show tools to the model, so that it cannot know them; "
                "give another one with --chat-template"
            )

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
