"""The core's records of requests and of adapter versions.

The file is long because the two refer to each other: a version has a queue of requests,
and a request its version.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from operator import attrgetter
from typing import Literal, NamedTuple, Protocol

from aioengine.core.adapters.version import Version
from aioengine.core.arrival_queue import ArrivalQueue
from aioengine.core.blocks import BlockManager
from aioengine.core.prefixes.invocation import NOWHERE, last_occurrence
from aioengine.core.speculation.drafting import Drafting
from aioengine.core.waiting_room import Ticket
from aioengine.events import EndReason
from aioengine.info import mix_name, scaled_digest
from aioengine.request import CachePin, RequestOptions, SamplingParams, TokenLogprob
from aioengine.schedulers.policy import Location
from aioengine.step import AdapterSource, LoadedAdapter, SequenceWork

_seq = attrgetter("seq")


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class AdapterFiles(Protocol):
    """An adapter's files in memory."""

    @property
    def nbytes(self) -> int: ...
    @property
    def files(self) -> AdapterSource: ...
    def share(self) -> AdapterFiles:
        """Return the same files for another version; each is released separately."""

    def release(self) -> None:
        """Free the files. Nothing may read them afterwards."""


class Owner(NamedTuple):
    """The tenant that an adapter was made for; None: requests without a tenant."""

    tenant: str | None


class AdapterEntry(Version):
    """One version of an adapter. A name's newer version is another entry."""

    __slots__ = (
        "copy_failed",
        "digest",
        "disk_seconds",
        "error",
        "expected",
        "files",
        "found",
        "held",
        "invocation",
        "label",
        "labels",
        "last_tenant",
        "last_used",
        "name",
        "nbytes",
        "owner",
        "path",
        "pin_when_read",
        "pinned",
        "places",
        "rank",
        "running",
        "scalable",
        "slot",
        "slot_nbytes",
        "slot_seconds",
        "uid",
        "version",
        "waiting",
        "wanted_since",
    )

    def __init__(
        self,
        uid: int,
        name: str,
        version: int,
        path: str,
        *,
        found: bool = False,
        files: AdapterFiles | None = None,
    ) -> None:
        super().__init__()
        self.uid = uid
        self.label = name
        """The name that it was registered under."""
        self.name = name
        """Name for policies: the registered name, or "name@version" once it is superseded."""
        self.version = version
        self.path = path
        self.found = found
        """Whether its folder was found by the resolver. If it cannot be read any more, the next request asks
        the resolver again."""
        self.files = files
        """Files of an adapter that was given in memory; they are read in place of a folder."""
        self.owner: Owner | None = None
        """Whom it was made for; None: for everybody."""
        self.scalable = True
        """Whether a step can multiply what it adds by a number."""
        self.held = False
        """Whether it is published only on demand, and not when it has been read."""
        self.slot: int | None = None
        """The slot that holds it or is being written with it."""
        self.rank = 0
        self.nbytes = 0
        self.slot_nbytes = 0
        """Bytes that it takes in a slot, on the rank with the largest share; 0 until it has been read."""
        self.places = 1
        """The slots of one size, and the places in the CPU cache, that it takes."""
        self.digest = ""
        self.expected = ""
        """The digest that it must have; "": any."""
        self.labels = 0
        """Labels of its classification head."""
        self.invocation: Sequence[int] = ()
        """If it is an activated LoRA adapter, it is applied from these tokens on."""
        self.pinned = False
        self.waiting: ArrivalQueue[Request] = ArrivalQueue()
        self.running = 0
        self.last_tenant: str | None = None
        """The tenant whose request was admitted last."""
        self.last_used = 0.0
        self.wanted_since: float | None = None
        """Set while a caller, and not a waiting request, asks for a load."""
        self.pin_when_read = False
        """Whether that load asked for a pin as well."""
        self.error: Exception | None = None
        """Error of its last read or copy; None after a success, or after another request for a load. While it
        is set, the adapter is read only on demand, never prefetched."""
        self.copy_failed: float | None = None
        """Time of the last failed copy into a slot."""
        self.disk_seconds: float | None = None
        self.slot_seconds: float | None = None

    def take(self, found: LoadedAdapter) -> None:
        """Note what was read."""
        self.rank, self.digest, self.disk_seconds = found.rank, found.digest, found.seconds
        self.labels, self.invocation, self.scalable = found.labels, found.invocation, found.scalable

    @property
    def head(self) -> Request | None:
        """The request that has waited longest for it."""
        return self.waiting.head

    @property
    def oldest_arrival(self) -> float | None:
        return self.waiting.oldest

    @property
    def wanted_by(self) -> str | None:
        """The tenant whose request has waited longest for it or, if none waits, ran on it last."""
        head = self.head
        return self.last_tenant if head is None else head.options.tenant

    @property
    def needed_since(self) -> float | None:
        """Time since when a request or caller has waited for it to be in the CPU cache; None if none does."""
        oldest, wanted = self.waiting.oldest, self.wanted_since
        if oldest is None:
            return wanted
        return oldest if wanted is None else min(oldest, wanted)


class Sink(Protocol):
    """Receives a request's tokens as they come."""

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], *, is_stop: bool) -> int | None:
        """Take the last tokens of the request, and the log-probabilities of the first of them. ``is_stop``:
        the last one is a stop token. Returns how many of them are left if the text reaches a stop string,
        which ends the request."""

    @property
    def waits_for_end(self) -> bool:
        """Whether nobody reads the tokens before the request's end."""

    def end(self, reason: EndReason, error: Exception | None) -> None:
        """Note that the request has ended. Called once."""


class Request:
    """A request from acceptance to its end."""

    __slots__ = (
        "_view",
        "adapter",
        "admitted",
        "arrival",
        "blocks",
        "cache",
        "cached_tokens",
        "committed",
        "computed",
        "deadline",
        "drafting",
        "first_token",
        "freed",
        "given",
        "hashed_for",
        "hashes",
        "id",
        "invoked",
        "is_plain",
        "last_token",
        "most_tokens",
        "options",
        "params",
        "pinned_tokens",
        "pins",
        "pooled",
        "prompt_len",
        "prompt_logprobs",
        "row",
        "scale",
        "seed",
        "seq",
        "sink",
        "started",
        "status",
        "stops",
        "ticket",
        "tokens",
        "worst_gap",
    )

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        *,
        adapter: AdapterEntry | None,
        seq: int,
        arrival: float,
        seed: int,
        deadline: float | None,
        options: RequestOptions,
        scale: float = 1.0,
        given: Sequence[int] = (),
        cache: BlockManager | None = None,
    ) -> None:
        self.id = request_id
        self.adapter = adapter
        self.scale = scale
        """What the adapter is multiplied by."""
        self.seq = seq
        """Order of arrival."""
        self.arrival = arrival
        self.params = params
        self.seed = seed
        self.deadline = deadline
        """The time by which it must have ended."""
        self.options = options
        self.prompt_len = len(prompt)
        self.tokens = [*prompt, *given]
        """Prompt followed by output."""
        self.stops = frozenset(params.stop_token_ids)
        """Tokens that end it."""
        self.most_tokens = self.prompt_len + params.max_tokens
        """Length, prompt and output, at which it ends."""
        self.given = len(given)
        """Number of output tokens that came with the request, generated by another engine."""
        self.status = Status.WAITING
        self.sink: Sink | None = None
        """Receiver of its output; None once it has ended."""
        self.ticket: Ticket | None = None
        """Place among the waiting requests; None once it has run."""
        self.computed = 0
        """Tokens whose KV is in ``blocks``."""
        self.started = 0
        """Tokens that were known when it was last admitted."""
        self.row: SequenceWork | None = None
        """Its share of steps in which it decodes plainly; kept from step to step."""
        self.is_plain = False
        """Whether each step after its prompt gives it one token, and only that; known once it is admitted."""
        self.blocks: list[int] = []
        """Its block table, one entry for every ``block_size`` positions."""
        self.freed = 0
        """Blocks after the first that no layer sees any more. They are given back, and the first has their
        places in ``blocks``."""
        self.cache = cache
        """Owner of ``blocks``."""
        self.hashes: list[bytes] = []
        """Prefix-cache identities of the full blocks of ``tokens``, as far as known."""
        self.hashed_for = b"", 0, b""
        """The keys that ``hashes`` was computed with."""
        self.invoked: tuple[Sequence[int], int] = (), 0
        """The invocation tokens of the last search, and its result, ``adapted_from``."""
        self.committed = 0
        """Number of ``blocks``, from the first on, that the prefix cache knows."""
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache when it was first admitted."""
        self.pins = _pins_within(options.cache_pins, self.prompt_len) if options.cache_pins else []
        """The pins that it asks for and that are not reached yet, the longest prefix first."""
        self.pinned_tokens = 0
        """Prompt tokens whose blocks it has pinned in the prefix cache."""
        self.admitted: float | None = None
        self.prompt_logprobs: list[TokenLogprob] | None = None if params.prompt_logprobs is None else []
        """Log-probabilities of the second prompt token, the third, ..., as far as they have been computed."""
        self.pooled: list[float] | None = None
        """The vector that ``pooling`` asks for, as far as it has been computed."""
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.drafting: Drafting | None = None
        """State from which tokens are proposed; None until they are."""
        self.worst_gap: float | None = None
        """The longest time between two of its tokens; None before the second."""
        self._view: CoreRequestView | None = None

    @property
    def view(self) -> CoreRequestView:
        """How policies see it."""
        if self._view is None:
            self._view = CoreRequestView(self)
        return self._view

    def drop_view(self) -> None:
        """Give up the view, so that an ended request is freed at once, and not by the garbage collector."""
        self._view = None

    @property
    def held(self) -> list[int]:
        """The blocks that it holds, each once."""
        return self.blocks[:1] + self.blocks[1 + self.freed :]

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def made_tokens(self) -> int:
        """Output tokens that were generated here."""
        return self.output_tokens - self.given

    @property
    def remaining(self) -> int:
        """Tokens that are known but not computed yet; 1 in steady decode."""
        return len(self.tokens) - self.computed

    @property
    def adapted_from(self) -> int:
        """Position from which on the adapter is applied: 0, or for an activated LoRA adapter the beginning of
        the last invocation in the prompt. Without an invocation it is beyond all tokens, as in PEFT."""
        entry = self.adapter
        if entry is None or not entry.invocation:
            return 0
        if self.invoked[0] is not entry.invocation:
            at = last_occurrence(self.tokens[: self.prompt_len], entry.invocation)
            self.invoked = entry.invocation, NOWHERE if at is None else at
        return self.invoked[1]

    @property
    def next_piece(self) -> int:
        """Return how many of the remaining tokens one step may compute. The adapter is applied to all of them
        or to none."""
        left = len(self.tokens) - self.computed
        entry = self.adapter
        if entry is None or not entry.invocation or self.computed >= self.adapted_from:
            return left
        return min(left, self.adapted_from - self.computed)

    def slot_at(self, position: int) -> int:
        """Return the slot that computes the token at ``position``; -1 for the base model."""
        entry = self.adapter
        if entry is None or (entry.invocation and position < self.adapted_from):
            return -1
        return -1 if entry.slot is None else entry.slot

    @property
    def unscored(self) -> int:
        """Number of prompt tokens whose log-probability is requested and not known yet."""
        known = self.prompt_logprobs
        return 0 if known is None else self.prompt_len - 1 - len(known)

    @property
    def adapter_name(self) -> str | None:
        """The name of what its adapter adds, such as "sql" or, scaled, "sql@2*0.5"; None: nothing."""
        entry = self.adapter
        if entry is None or self.scale == 1.0:
            return None if entry is None else entry.label
        return mix_name([(f"{entry.label}@{entry.version}", self.scale)])

    @property
    def content(self) -> str:
        """The digest of what its adapter adds, scaled; "" for the base model, or while it is not known."""
        digest = "" if self.adapter is None else self.adapter.digest
        return scaled_digest(digest, self.scale) if digest and self.scale != 1.0 else digest

    @property
    def cache_key(self) -> bytes:
        """Return the key that cached KV must share beside the tokens: the adapter's content, on which KV
        depends, and the caller's salt. The first part is preceded by its length, so that no two pairs have
        the same key."""
        return self._key(self.content.encode())

    def _key(self, content: bytes) -> bytes:
        salt = self.options.cache_salt
        return b"%d:%b%b" % (len(content), content, b"" if salt is None else salt.encode())

    def hash_blocks(self, cache: BlockManager) -> list[bytes]:
        """Bring ``hashes`` up to date with ``tokens`` and with the adapter's content, which may have changed
        if the adapter was read again."""
        keys = self.cache_key, 0, b""
        turn = self.adapted_from // cache.block_size
        if turn:  # the base model computes the tokens before the invocation
            keys = self._key(b""), turn, keys[0]
        known = self.hashes if keys == self.hashed_for else []
        self.hashes = cache.hash_blocks(keys[0], self.tokens, known, turn=turn, rest_key=keys[2])
        self.hashed_for = keys
        return self.hashes

    @property
    def caches(self) -> bool:
        """Whether its blocks go to the prefix cache and come from it. They do not for a vector, which needs
        the states of all tokens and is not continued."""
        return self.params.pooling is None

    def find_cached(self, cache: BlockManager) -> list[int]:
        """Return the blocks of the prefix cache that it would share if it were admitted now.

        At least one token is always left to compute, because its logits are needed. The same is true of the
        token before each prompt token whose log-probability is requested, and of all later tokens.
        """
        if (
            not self.caches
            or not cache.prefix_caching
            or (self.adapter is not None and not self.adapter.digest)
        ):
            return []
        needless = len(self.prompt_logprobs or ()) if self.unscored else len(self.tokens) - 1
        return cache.match(self.hash_blocks(cache), needless)


class CoreRequestView:
    """The read-only :class:`~aioengine.schedulers.policy.RequestView` of a request."""

    __slots__ = ("_r",)

    def __init__(self, request: Request) -> None:
        self._r = request

    # An attrgetter takes half as long as a function in Python, and a decision reads these very often.
    request_id = property(attrgetter("_r.id"))
    arrival = property(attrgetter("_r.arrival"))
    priority = property(attrgetter("_r.options.priority"))
    deadline = property(attrgetter("_r.deadline"))
    tenant = property(attrgetter("_r.options.tenant"))
    prompt_tokens = property(attrgetter("_r.prompt_len"))
    max_tokens = property(attrgetter("_r.params.max_tokens"))
    computed_tokens = property(attrgetter("_r.computed"))

    @property
    def output_tokens(self) -> int:
        return len(self._r.tokens) - self._r.prompt_len

    @property
    def adapter(self) -> str | None:
        entry: AdapterEntry | None = self._r.adapter
        return None if entry is None else entry.name

    @property
    def cached_tokens(self) -> int:
        request: Request = self._r
        cache = request.cache
        if request.status is not Status.WAITING or cache is None:
            return request.cached_tokens
        return min(len(request.find_cached(cache)) * cache.block_size, request.prompt_len)

    @property
    def expected_tokens(self) -> int:
        expected = self._r.options.expected_tokens
        return max(self._r.params.max_tokens, 1) if expected is None else expected


def _pins_within(pins: Sequence[CachePin], length: int) -> list[CachePin]:
    """Return the pins of a prompt of ``length`` tokens, the longest first."""
    within = [CachePin(tokens=min(p.tokens, length), seconds=p.seconds) for p in pins]
    return sorted(within, key=lambda pin: -pin.tokens)


def label_of(request: Request) -> str | None:
    """Return the registered name of its adapter; None for the base model."""
    return None if request.adapter is None else request.adapter.label


def location_name(entry: AdapterEntry) -> Literal["disk", "loading", "cpu", "slot"]:
    """Return its location in the words of the public API."""
    match entry.location:
        case Location.DISK:
            return "disk"
        case Location.LOADING:
            return "loading"
        case Location.CPU:
            return "cpu"
        case Location.SLOT:
            return "slot"


def where_is(entry: AdapterEntry | None) -> str:
    """Name an adapter and where it is, for the message of an error; "" for the base model."""
    return "" if entry is None else f" for adapter {entry.label!r} (location: {location_name(entry)})"
