"""The core's records of requests and of adapter versions. The two refer to each other: a version has a queue
of requests, and a request its version. Each has a view, through which policies see it."""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import takewhile
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, cast

from aioengine.core.adapters.version import Version
from aioengine.core.blocks import BlockManager
from aioengine.core.speculation import Drafting
from aioengine.core.waiting_room import Reservation
from aioengine.errors import AdapterChanged, AdapterTooLarge, EngineOverloaded
from aioengine.events import EndReason
from aioengine.info import AdapterInfo, AdapterLocation, mix_name, scaled_digest
from aioengine.request import RequestOptions, SamplingParams, TokenLogprob
from aioengine.schedulers.policy import Location
from aioengine.step import AdapterSource, LoadedAdapter, SequenceWork


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class AdapterFiles(Protocol):
    """An adapter's files in memory, which goes with the last reference to them."""

    @property
    def files(self) -> AdapterSource: ...


class Owner(NamedTuple):
    """The tenant that an adapter was made for; None: requests without a tenant."""

    tenant: str | None


class ArrivalQueue:
    """Requests in arrival order; adding a new one and removing any one are O(1). (An OrderedDict finds its
    first key at once; a dict whose front was emptied has to look for it.)"""

    __slots__ = ("_requests", "head", "oldest")

    def __init__(self) -> None:
        self._requests: OrderedDict[int, Request] = OrderedDict()
        self.head: Request | None = None
        """The first request; None if the queue is empty."""
        self.oldest: float | None = None
        """Its arrival."""

    def add(self, request: Request) -> None:
        self._requests[request.seq] = request
        if self.head is None:
            self._find_head()

    def put_back(self, request: Request) -> None:
        """Add a preempted request. It is older than most, so its place is found from the front."""
        older = list(takewhile(request.seq.__gt__, self._requests))
        self._requests[request.seq] = request
        for seq in (request.seq, *reversed(older)):
            self._requests.move_to_end(seq, last=False)
        self._find_head()

    def remove(self, request: Request) -> None:
        del self._requests[request.seq]
        if request is self.head:
            self._find_head()

    def _find_head(self) -> None:
        self.head = head = next(iter(self), None)
        self.oldest = None if head is None else head.arrival

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


class RecordView:
    """How a policy sees a record: live and read-only. It is built once, with the record, which it wraps.

    An attrgetter takes half as long as a function in Python, and a decision reads these very often.
    """

    __slots__ = ("_of",)

    def __init__(self, record: Any) -> None:
        self._of = record


class CoreRequestView(RecordView):
    """The :class:`~aioengine.schedulers.policy.RequestView` of a request."""

    __slots__ = ()

    request_id = property(attrgetter("_of.id"))
    arrival = property(attrgetter("_of.arrival"))
    priority = property(attrgetter("_of.options.priority"))
    deadline = property(attrgetter("_of.deadline"))
    tenant = property(attrgetter("_of.options.tenant"))
    prompt_tokens = property(attrgetter("_of.prompt_len"))
    max_tokens = property(attrgetter("_of.params.max_tokens"))
    computed_tokens = property(attrgetter("_of.computed"))
    output_tokens = property(attrgetter("_of.output_tokens"))
    cached_tokens = property(attrgetter("_of.cached_now"))

    @property
    def adapter(self) -> str | None:
        entry = self._of.adapter
        name: str | None = None if entry is None else entry.name
        return name

    @property
    def expected_tokens(self) -> int:
        expected: int | None = self._of.options.expected_tokens
        return max(self._of.params.max_tokens, 1) if expected is None else expected


class CoreAdapterView(RecordView):
    """The :class:`~aioengine.schedulers.policy.AdapterView` of an adapter's version."""

    __slots__ = ()

    name = property(attrgetter("_of.name"))
    rank = property(attrgetter("_of.rank"))
    bytes = property(attrgetter("_of.nbytes"))
    location = property(attrgetter("_of.location"))
    slot = property(attrgetter("_of.slot"))
    """The slot that holds it, or that it is being copied to."""
    pinned = property(attrgetter("_of.pinned"))
    waiting = property(lambda self: len(self._of.waiting))
    running = property(attrgetter("_of.running"))
    last_used = property(attrgetter("_of.last_used"))
    disk_seconds = property(attrgetter("_of.disk_seconds"))
    slot_seconds = property(attrgetter("_of.slot_seconds"))
    oldest_arrival = property(attrgetter("_of.waiting.oldest"))


@dataclass(slots=True, eq=False)
class AdapterEntry(Version):
    """One version of an adapter. A name's newer version is another entry."""

    uid: int
    label: str
    """The name that it was registered under."""
    version: int
    path: str
    source: str | None = None
    """What was looked up to find its folder; "": its name, by the resolver; None: the path was given. If the
    folder cannot be read any more, the next request looks it up again."""
    files: AdapterFiles | None = None
    """Files of an adapter that was given in memory; they are read in place of a folder."""
    name: str = field(init=False)
    """Name for policies: the registered name, or "name@version" once it is superseded."""
    view: CoreAdapterView = field(init=False)
    """How policies see it."""
    owner: Owner | None = None
    """Whom it was made for; None: for everybody."""
    scalable: bool = True
    """Whether a step can multiply what it adds by a number."""
    slot: int | None = None
    """The slot that holds it or is being written with it."""
    rank: int = 0
    nbytes: int = 0
    slot_nbytes: int = 0
    """Bytes that it takes in a slot, on the rank with the largest share; 0 until it has been read."""
    places: int = 1
    """The slots of one size, and the places in the CPU cache, that it takes."""
    digest: str = ""
    expected: str = ""
    """The digest that it must have; "": any."""
    labels: int = 0
    """Labels of its classification head."""
    invocation: Sequence[int] = ()
    """If it is an activated LoRA adapter, it is applied from these tokens on."""
    pinned: bool = False
    waiting: ArrivalQueue = field(default_factory=ArrivalQueue)
    running: int = 0
    last_tenant: str | None = None
    """The tenant whose request was admitted last."""
    last_used: float = 0.0
    wanted_since: float | None = None
    """Set while a caller, and not a waiting request, asks for a load."""
    error: Exception | None = None
    """Error of its last read or copy; None after a success, or after another request for a load. While it is
    set, the adapter is read only on demand, never prefetched."""
    copy_failed: float | None = None
    """Time of the last failed copy into a slot."""
    readers: int = 0
    """Callers that wait for it to be read."""
    disk_seconds: float | None = None
    slot_seconds: float | None = None

    def __post_init__(self) -> None:
        self.name, self.view = self.label, CoreAdapterView(self)

    def changed(self, why: str) -> AdapterChanged:
        """Build the error of files that have changed."""
        text = f"its files have changed {why}"
        return AdapterChanged(text, name=self.label, path=self.path, transient=True)

    def too_large(self, why: str) -> AdapterTooLarge:
        return AdapterTooLarge(f"it takes {why}", name=self.label, path=self.path)

    def shut_out(self, why: str, todo: str) -> EngineOverloaded:
        """Build the error of an adapter that pinned ones leave no room for."""
        return EngineOverloaded(f"adapter {self.label!r} ({self.path}) {why}; {todo}", bound="pinned")

    def take(self, found: LoadedAdapter) -> None:
        """Note what was read."""
        self.rank, self.digest, self.disk_seconds = found.rank, found.digest, found.seconds
        self.labels, self.invocation, self.scalable = found.labels, found.invocation, found.scalable

    @property
    def wanted_by(self) -> str | None:
        """The tenant whose request has waited longest for it or, if none waits, ran on it last."""
        head = self.waiting.head
        return self.last_tenant if head is None else head.options.tenant

    @property
    def needed_since(self) -> float | None:
        """Time since when a request or caller has waited for it to be in the CPU cache; None if none does."""
        oldest, wanted = self.waiting.oldest, self.wanted_since
        if oldest is None:
            return wanted
        return oldest if wanted is None else min(oldest, wanted)

    @property
    def where(self) -> AdapterLocation:
        """Its location in the words of the public API."""
        return cast(AdapterLocation, self.location.lower())

    @property
    def info(self) -> AdapterInfo:
        """Its present state."""
        return AdapterInfo(
            name=self.label,
            version=self.version,
            path=self.path,
            rank=self.rank,
            bytes=self.nbytes,
            digest=self.digest,
            labels=self.labels,
            location=self.where,
            slot=self.slot if self.location is Location.SLOT else None,
            pinned=self.pinned,
            running=self.running,
            waiting=len(self.waiting),
        )


class Sink(Protocol):
    """Receives a request's tokens as they come."""

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], *, is_stop: bool) -> int | None:
        """Take the last tokens of the request, and the log-probabilities of the first of them. ``is_stop``:
        the last one is a stop token. Returns how many of them are left if the text reaches a stop string,
        which ends the request."""

    waits_for_end: bool
    """Whether nobody reads the tokens before the request's end: then only the last ones are pushed."""

    def end(self, reason: EndReason, error: Exception | None) -> None:
        """Note that the request has ended. Called once."""


@dataclass(slots=True, eq=False)
class Request:
    """A request from acceptance to its end."""

    id: str
    tokens: list[int]
    """Prompt followed by output."""
    prompt_len: int
    params: SamplingParams
    options: RequestOptions
    adapter: AdapterEntry | None
    scale: float
    """What the adapter is multiplied by."""
    seq: int
    """Order of arrival."""
    arrival: float
    seed: int
    deadline: float | None
    """The time by which it must have ended."""
    stops: frozenset[int]
    """Tokens that end it."""
    most_tokens: int
    """Length, prompt and output, at which it ends."""
    cache: BlockManager
    """Owner of ``blocks``."""
    reservation: Reservation | None
    """Place among the waiting requests; None once it has run."""
    view: CoreRequestView = field(init=False)
    """How policies see it; dropped at its end, so that it is freed at once, and not by the garbage
    collector."""
    given: int = field(init=False)
    """Number of output tokens that came with the request, generated by another engine."""
    status: Status = Status.WAITING
    sink: Sink | None = None
    """Receiver of its output; None once it has ended."""
    computed: int = 0
    """Tokens whose KV is in ``blocks``."""
    started: int = 0
    """Tokens that were known when it was last admitted."""
    row: SequenceWork | None = None
    """Its share of the step that is formed or in flight, while it runs."""
    is_plain: bool = False
    """Whether each step after its prompt gives it one token, and only that; known once it is admitted."""
    decodes: bool = False
    """Whether ``row`` is a plain decode. The next step has it, too: only the token and its place change, as
    soon as there is one."""
    blocks: list[int] = field(default_factory=list)
    """Its block table, one entry for every ``block_size`` positions."""
    hashes: list[bytes] = field(default_factory=list)
    """Prefix-cache identities of the full blocks of ``tokens``, as far as known."""
    hashed_for: tuple[str, int] = ("", 0)
    """Content of the adapter that ``hashes`` was computed for, and the block from which it is applied."""
    invoked: tuple[Sequence[int], int] = ((), 0)
    """The invocation tokens of the last search, and its result, ``adapted_from``."""
    committed: int = 0
    """Number of ``blocks``, from the first on, that the prefix cache knows."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    admitted: float | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """None for the first prompt token, then log-probabilities of the others, as far as they are computed."""
    pooled: list[float] | None = None
    """The vector that ``pooling`` asks for, as far as it has been computed."""
    first_token: float | None = None
    last_token: float | None = None
    drafting: Drafting | None = None
    """State from which tokens are proposed; None until they are."""
    worst_gap: float | None = None
    """The longest time between two of its tokens; None before the second."""

    def __post_init__(self) -> None:
        self.view, self.given = CoreRequestView(self), len(self.tokens) - self.prompt_len
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

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
    def has_prompt_left(self) -> bool:
        """Whether some of the tokens that it was admitted with take another step than the one that samples
        the next."""
        return self.computed < self.started and len(self.tokens) - self.computed > 1

    @property
    def label(self) -> str | None:
        """The registered name of its adapter; None for the base model."""
        return None if self.adapter is None else self.adapter.label

    @property
    def adapted_from(self) -> int:
        """Position from which on the adapter is applied: 0, or for an activated LoRA adapter the beginning of
        the last invocation in the prompt: the keys and values before are the base model's (Greenewald et al.,
        arXiv:2504.12397). Without an invocation it is beyond all tokens, as in PEFT."""
        entry = self.adapter
        if entry is None or not entry.invocation:
            return 0
        if self.invoked[0] is not entry.invocation:
            at = last_occurrence(self.tokens[: self.prompt_len], entry.invocation)
            self.invoked = entry.invocation, sys.maxsize if at is None else at
        return self.invoked[1]

    @property
    def next_piece(self) -> int:
        """Return how many of the remaining tokens one step may compute. The adapter is applied to all of them
        or to none."""
        left = len(self.tokens) - self.computed
        until = self.adapted_from
        return left if self.computed >= until else min(left, until - self.computed)

    def slot_at(self, position: int) -> int:
        """Return the slot that computes the token at ``position``; -1 for the base model."""
        entry = self.adapter
        if entry is None or entry.slot is None or position < self.adapted_from:
            return -1
        return entry.slot

    @property
    def unscored(self) -> int:
        """Number of prompt tokens whose log-probability is requested and not known yet."""
        known = self.prompt_logprobs
        return 0 if known is None else self.prompt_len - len(known)

    @property
    def adapter_name(self) -> str | None:
        """The name of what its adapter adds, such as "sql" or, scaled, "sql@2*0.5"; None: nothing."""
        entry = self.adapter
        if entry is None or self.scale == 1.0:
            return self.label
        return mix_name([(f"{entry.label}@{entry.version}", self.scale)])

    @property
    def content(self) -> str:
        """The digest of what its adapter adds, scaled; "" for the base model, or while it is not known."""
        digest = "" if self.adapter is None else self.adapter.digest
        return scaled_digest(digest, self.scale) if digest and self.scale != 1.0 else digest

    def _cache_key(self, content: bytes) -> bytes:
        """Return what cached KV must share beside the tokens: the adapter's content, on which KV depends, and
        the caller's salt. The first part is preceded by its length, so that no two pairs are the same."""
        salt = self.options.cache_salt
        return b"%d:%b%b" % (len(content), content, b"" if salt is None else salt.encode())

    def hash_blocks(self, cache: BlockManager) -> list[bytes]:
        """Bring ``hashes`` up to date with ``tokens`` and with the adapter's content, which may have changed
        if the adapter was read again."""
        read = self.content, self.adapted_from // cache.block_size
        if read != self.hashed_for:
            self.hashes, self.hashed_for = [], read
        if len(self.tokens) // cache.block_size > len(self.hashes):
            (content, turn), key = read, self._cache_key
            own = key(content.encode())
            # The base model computes the tokens before the invocation.
            keys = (key(b""), turn, own) if turn else (own, 0, b"")
            self.hashes = cache.hash_blocks(keys[0], self.tokens, self.hashes, *keys[1:])
        return self.hashes

    @property
    def caches(self) -> bool:
        """Whether its blocks go to the prefix cache and come from it. They do not for a vector, which needs
        the states of all tokens and is not continued."""
        return self.params.pooling is None

    def find_cached(self) -> list[int]:
        """Return the blocks of the prefix cache that it would share if it were admitted now. At least one
        token is always left to compute, because its logits are needed. The same is true of the token before
        each prompt token whose log-probability is requested, and of all later tokens."""
        unread = self.adapter is not None and not self.adapter.digest
        if not self.caches or not self.cache.prefix_caching or unread:
            return []
        needless = (self.prompt_len - self.unscored if self.unscored else len(self.tokens)) - 1
        return self.cache.match(self.hash_blocks(self.cache), needless)

    @property
    def cached_now(self) -> int:
        """Prompt tokens that are in the prefix cache or, once it has run, that were when it was admitted."""
        if self.status is not Status.WAITING:
            return self.cached_tokens
        return min(len(self.find_cached()) * self.cache.block_size, self.prompt_len)


def where_is(entry: AdapterEntry | None) -> str:
    """Name an adapter and where it is, for the message of an error; "" for the base model."""
    return "" if entry is None else f" for adapter {entry.label!r} (location: {entry.where})"


def last_occurrence(tokens: Sequence[int], part: Sequence[int]) -> int | None:
    """Return where ``part`` occurs last in ``tokens``; None if it does not.

    Each token becomes one character, so Python's text search finds it in time linear in the lengths.
    """

    def text(tokens: Sequence[int]) -> str:
        encoding = f"utf-32-{sys.byteorder[0]}e"
        return array("I", tokens[::-1]).tobytes().decode(encoding, "surrogatepass")

    at = text(tokens).find(text(part))
    return None if at < 0 else len(tokens) - len(part) - at
