"""Context of every route: the engine, the settings, and the conversion of names and texts."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aioengine.adapters.names import NAME_RULE
from aioengine.adapters.read_threads import SharedRead
from aioengine.errors import ConfigError, PromptTooLong, RequestInvalid
from aioengine.guided import Guide
from aioengine.info import without_versions
from aioengine.request import RequestOptions, SamplingParams, TokenConstraint, Wanted, for_choice
from aioengine.runtime.client import EngineClient
from aioengine.runtime.requests.vectors import read_label_names
from aioengine.runtime.text_work import EACH, SHORT, size_of_all
from aioengine.server.access.auth import Identity
from aioengine.server.access_log import RequestRecord
from aioengine.server.errors import ApiError, model_not_found
from aioengine.server.formats.registry import AnswerFormats
from aioengine.server.generation import Generation, Scores
from aioengine.server.openai.api import GenerationFields, ModelFields
from aioengine.server.openai.constraints import Form
from aioengine.server.openai.generation_config import FILE_NAME, SamplingDefaults, read_sampling_defaults
from aioengine.server.openai.logprobs import TokenBytes
from aioengine.server.openai.sampling import drawn_seeds
from aioengine.server.settings import ServerSettings
from aioengine.server.transport.starts import Starts

if TYPE_CHECKING:
    from aioengine.model.text.tokenizer import Tokenizer

_VERSION = re.compile(r"@([0-9]{1,18}|latest)$")
"""End of an adapter's name in requests for one of its versions."""

PAIRS_PER_BODY = 2
"""Characters of all pairs of texts in one request, in bodies of the largest size: a long text may be paired
with thousands."""

logger = logging.getLogger("aioengine.server")


class Context:
    def __init__(self, engine: EngineClient, settings: ServerSettings) -> None:
        self.engine = engine
        self.change(settings)
        self.created = int(time.time())
        self.scores = Scores(settings.retry_after)
        self.open_requests: set[RequestRecord] = set()
        """Open requests, without probes and pages."""
        self._starts = Starts(lambda: len(self.open_requests))
        self.draining = False
        """Whether new requests are refused; set by whoever runs the server."""
        self._draw = random.Random().getrandbits  # SystemRandom releases the GIL at each call
        self._seeds = drawn_seeds((engine.config.seed or None) if settings.seed is None else settings.seed)
        self._guide: Guide | None = None
        self._tools_noted = False
        self._defaults: SamplingDefaults | None = None
        self._label_names = SharedRead("aioengine-labels", lambda: read_label_names(engine.model_path))

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
            self._defaults = await self.engine.text_work.run(SHORT + 1, self._read_defaults)
            given = " ".join(f"{name}={value:g}" for name, value in self._defaults.given().items())
            logger.info("defaults of requests, from generation_config.json: %s", given or "none")
        return self._defaults

    def _read_defaults(self) -> SamplingDefaults:
        wanted, found = self.settings.generation_config, self.engine.model_path
        if wanted not in ("auto", "none"):
            return read_sampling_defaults(Path(wanted))
        if wanted == "auto" and found is not None and (found / FILE_NAME).is_file():
            return read_sampling_defaults(found)
        return SamplingDefaults()

    @property
    def stuck(self) -> bool:
        """Whether a step has run for longer than ``stuck_step_seconds``."""
        engine = self.engine
        return (
            engine.state in ("running", "draining") and engine.step_age() > self.settings.stuck_step_seconds
        )

    @property
    def max_body_bytes(self) -> int:
        """Bound on bodies; by default 64 bytes a token of the longest prompt, and 1 MiB for the rest."""
        return self.settings.max_body_bytes or 2**20 + 64 * self.engine.plan.max_model_len

    def adapter_of(self, model: str, identity: Identity, field: str = "model") -> str | None:
        """Return the adapter that a request's ``field`` names; None for the base model.

        If ``identity`` may not use it, raises the same ApiError as for an unknown model, without checking
        whether it exists.
        """
        is_base = model in self.model_names or (
            model == self.engine.config.model and not self.settings.served_model_names
        )
        adapter = None if is_base else model
        # Otherwise any text, however long, would be logged as the adapter's name.
        name = None if adapter is None else _VERSION.sub("", adapter)
        if name is not None and NAME_RULE.fullmatch(name) is None:
            raise model_not_found(model[:300], field)
        if not identity.models.allow(name):
            raise model_not_found(model, field)
        return adapter

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises ApiError if the model has none."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ApiError(400, f"{self.model_names[0]} has no tokenizer: it takes and gives token ids only")
        return tokenizer

    @property
    def formats(self) -> AnswerFormats:
        """Return the formats of the model's answers. Raises ApiError if it has no tokenizer."""
        if self._formats is None:
            tokenizer, settings = self.tokenizer, self.settings
            self._formats = AnswerFormats.chosen(
                tokenizer.chat_template,
                settings.tool_call_parser,
                settings.reasoning_parser,
                tokenizer.added_tokens,
            )
            known = self._formats
            logger.info("formats of answers: tools=%s reasoning=%s", known.tools, known.reasoning)
        return self._formats

    def ends_with(self, prompt: Sequence[int], text: str) -> bool:
        """Whether a prompt ends with this short text; white space after it does not matter."""
        return self.tokenizer.decode(list(prompt[-16:]), False).rstrip().endswith(text)

    def token_bytes(self) -> TokenBytes:
        """Return the table of token bytes, which stays valid for a request whatever happens to the engine."""
        tokenizer = self.engine.tokenizer
        return (lambda _token: b"") if tokenizer is None else tokenizer.token_bytes

    async def encode(
        self,
        texts: Sequence[str],
        *,
        owner: str | None,
        add_special_tokens: bool = True,
        keep: int | None = None,
    ) -> list[list[int]]:
        """Tokenize each text; owners take turns. With ``keep``, only that many last tokens of each; without,
        raises ApiError for a text that cannot fit."""
        encode = self._encoder(add_special_tokens, keep, field="prompt")
        work = self.engine.text_work
        return await work.run(size_of_all(texts), lambda: encode(texts), owner)

    async def encode_pairs(self, pairs: Sequence[tuple[str, str]], *, owner: str | None) -> list[list[int]]:
        """Encode pairs of texts as :meth:`encode` does single ones. Raises ApiError if they are too long."""
        tokenizer, limit = self.tokenizer, self.engine.plan.max_model_len

        def encode() -> list[list[int]]:
            try:
                return tokenizer.encode_pairs(pairs, limit=limit)
            except PromptTooLong as error:
                raise self.too_long(error.tokens, field="documents", at_least=error.at_least) from None

        size = sum(len(first) + len(second) for first, second in pairs)
        most = PAIRS_PER_BODY * self.max_body_bytes
        if size > most:
            raise ApiError(
                400,
                f"documents: they and the query, which is read with each of them, have {size} characters "
                f"together, and one request may have {most}; send fewer documents at a time",
                param="documents",
                code="invalid_value",
            )
        return await self.engine.text_work.run(size + EACH * len(pairs), encode, owner)

    async def label_names(self) -> list[str]:
        """Return the model's ``id2label``; empty if it has none."""
        return await self._label_names.result()

    async def encode_chat(
        self,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
        *,
        record: RequestRecord,
        keep: int | None = None,
    ) -> list[int]:
        """Render messages by the chat template, and tokenize the result as :meth:`encode` does."""
        tokenizer = self.tokenizer
        encode = self._encoder(False, keep, field="messages")

        def encode_chat() -> list[int]:
            [ids] = encode([tokenizer.render_chat(messages, **variables)])
            return ids

        # Never on the event loop, because a template may take any time. It may write all of the body, tools
        # and arguments of calls included.
        return await self.engine.text_work.run(SHORT + record.body_size, encode_chat, record.owner)

    def _encoder(
        self, add_special_tokens: bool, keep: int | None, *, field: str
    ) -> Callable[[Sequence[str]], list[list[int]]]:
        tokenizer, limit = self.tokenizer, self.engine.plan.max_model_len

        def encode(texts: Sequence[str]) -> list[list[int]]:
            if keep is not None and keep <= limit:
                return tokenizer.encode_ends(texts, keep, add_special_tokens)
            try:
                return tokenizer.encode_all(texts, add_special_tokens, limit=limit)
            except PromptTooLong as error:
                raise self.too_long(error.tokens, field=field, at_least=error.at_least) from None

        return encode

    def kept(self, keep: int | None, max_tokens: int | None) -> int | None:
        """Return how many last tokens of each prompt ``truncate_prompt_tokens`` keeps; None: all. -1 keeps as
        many as leave room for ``max_tokens``, or for one."""
        if keep is None or keep >= 0:
            return keep
        room = 1 if max_tokens is None else max_tokens
        return max(self.engine.plan.max_model_len - room, 1)

    async def texts_of(
        self, prompts: Sequence[list[int]], texts: list[str] | None, *, owner: str | None
    ) -> list[str]:
        """Return the prompts' texts: the given ones, or the decoded token ids."""
        if texts is not None:
            return texts
        tokenizer = self.tokenizer

        def decode(prompt: list[int]) -> str:
            known = [token for token in prompt if 0 <= token < 2**31]  # the engine refuses others
            return tokenizer.decode(known, skip_special_tokens=False)

        size = size_of_all(prompts)
        return await self.engine.text_work.run(size, lambda: [decode(prompt) for prompt in prompts], owner)

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

    def check_prompts(
        self, prompts: Sequence[list[int]], n: int, *, field: str, max_tokens: int | None = None
    ) -> None:
        """Raise ApiError for prompts that the engine cannot take, with the code that clients know."""
        limit = self.engine.plan.max_model_len
        if len(prompts) * n > self.settings.max_choices:
            raise ApiError(
                400,
                f"n: {len(prompts)} prompts with {n} choices each are too many; one request may have "
                f"{self.settings.max_choices} choices",
                param="n",
                code="invalid_value",
            )
        longest = max(map(len, prompts))
        if longest > limit - (max_tokens != 0):
            raise self.too_long(longest, field=field)

    def too_long(self, tokens: int, *, field: str, at_least: bool = False) -> ApiError:
        limit = self.engine.plan.max_model_len
        has = f"at least {tokens}" if at_least else f"{tokens}"
        text = f"This model's maximum context length is {limit} tokens, and the prompt has {has}"
        return ApiError(400, f"{text}: please shorten it", param=field, code="context_length_exceeded")

    def generation(
        self,
        fields: GenerationFields,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        form: Form | None,
        record: RequestRecord,
        *,
        prefix: str,
    ) -> Generation:
        """Build the generation of ``n`` choices for each prompt, which is still to be prepared. Its id begins
        with ``prefix``."""
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=next(self._seeds))
        of_choices = [for_choice(params, choice) for _ in prompts for choice in range(fields.n or 1)]

        async def constrain() -> TokenConstraint:
            assert form is not None
            try:
                made = await form.constraint(self.guide, record.owner)
            except ConfigError as error:
                raise RequestInvalid(str(error)) from error
            record.left_out(form.not_enforced)
            return made

        unique = f"{prefix}{self.new_id()}"
        record.completion_id = unique if fields.request_id is None else f"{prefix}{fields.request_id}"
        record.stream = bool(fields.stream)
        wanted = self.wanted(fields, record)
        options = RequestOptions(
            adapter=wanted if isinstance(wanted, str) else None,
            mix=None if isinstance(wanted, str) else wanted,
            priority=fields.priority or 0,
            deadline=self.settings.request_timeout,
            tenant=_of_shares(record, len(of_choices)),
            cache_salt=self._cache_salt(record.tenant, fields.cache_salt),
        )
        generation = Generation(
            self.engine,
            unique,  # even where another request has chosen the same id
            prompts,
            of_choices,
            options,
            record,
            reply_id=record.completion_id,
            scores=self.scores,
            turn=partial(self._starts.turn, options.tenant, record) if len(of_choices) > 1 else None,
            constrain=None if form is None else constrain,
            with_ids=bool(fields.return_token_ids),
        )
        if record.admission is not None:
            names = (options.adapter,) if options.mix is None else options.mix
            for name in {without_versions(name) for name in names if name is not None}:
                of_adapter = record.identity.adapter_meters.get(name)
                if of_adapter is not None:
                    record.admission.also(of_adapter, time.monotonic())
            record.admission.charge_prompt(record.prompt_tokens or 0, time.monotonic())
        return generation

    def wanted(self, fields: ModelFields, record: RequestRecord) -> Wanted:
        """Return the adapter or the mix that a request asks for, and note its name. Raises ApiError if its
        key may not use it, or if ``model`` is not the base model of a mix."""
        record.adapter = adapter = self.adapter_of(fields.model, record.identity)
        record.wanted = (None if adapter is None else _VERSION.sub("", adapter),)
        mix = fields.adapters
        if mix is None:
            return adapter
        if adapter is not None:
            raise ApiError(
                400,
                f"adapters: with this field, model must be the base model's name ({self.model_names[0]})",
                param="adapters",
                code="invalid_value",
            )
        if not mix:
            raise ApiError(400, "adapters: is empty", param="adapters", code="invalid_value")
        record.named_in = "adapters"
        for name in mix:
            if self.adapter_of(name, record.identity, record.named_in) is None:
                raise ApiError(
                    400, f"adapters: {name!r} is the base model; name adapters only", param="adapters"
                )
        record.adapter = "+".join(sorted(mix))[:255]
        record.wanted = (None, *(_VERSION.sub("", name) for name in mix))
        return mix

    def _cache_salt(self, tenant: str | None, asked: str | None) -> str | None:
        """Combine the tenant and the requested salt, as JSON: no client can make another tenant's salt."""
        owner = None if self.settings.share_prefix_cache else tenant
        return None if owner is None and asked is None else msgspec.json.encode((owner, asked)).decode()

    @property
    def guide(self) -> Guide:
        """Return the guide. Raises ConfigError if guided decoding is not available."""
        if self._guide is None:
            self._guide = Guide(self.engine)
        return self._guide


def _of_shares(record: RequestRecord, choices: int) -> str | None:
    """Return the owners whose shares a request's choices count on.

    Without keys, all clients of one address are one owner; there, requests for several choices count for a
    separate owner, so that a single request does not wait for hundreds of choices.
    """
    return f"{record.owner}, several choices" if record.tenant is None and choices > 1 else record.owner
