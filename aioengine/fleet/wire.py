"""Messages between a gateway and a replica: MessagePack, in frames that gather new output.

A gateway sends lists of :data:`Order`. A replica sends one :class:`Frame` for each step with output for the
gateway, and at least one in each heartbeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from aioengine.checks import plain
from aioengine.errors import AdapterNotFound
from aioengine.info import AdapterInfo, AdapterLocation, SlotInfo
from aioengine.request import FinishReason, RequestOptions, TokenLogprob
from aioengine.schedulers.routing import Report, Tiers


class ChannelName(NamedTuple):
    """Name of a channel: its gateway, and its number among the gateway's channels to any replicas. What
    belongs to an earlier channel may come late, and must not count for the one that has taken its place."""

    gateway: str
    number: int


class Submit(msgspec.Struct, tag="submit", array_like=True):
    """Run a request. ``key`` is the gateway's number for it."""

    key: int
    request_id: str
    prompt: list[int]
    params: dict[str, Any]
    options: RequestOptions
    grammar: str | None = None
    """Text of its constraint."""
    trace: dict[str, str] = {}
    """Headers that name its span, in W3C's form; empty: it is not traced."""
    believed: bool = False
    """Whether the gateway believes that the replica has its adapter in memory."""
    contents: list[str] = []
    """Digests of the versions that it names, in the order of its adapters; "": what is current."""
    content: str = ""
    """If it has begun elsewhere: digest of its adapter's content there, or its mix's, which it must also have
    here."""


class Abort(msgspec.Struct, tag="abort", array_like=True):
    key: int


class LimitWaiting(msgspec.Struct, tag="limit", array_like=True):
    max_waiting: dict[str, int]


Order = Submit | Abort | LimitWaiting


class Delta(msgspec.Struct, array_like=True, omit_defaults=True):
    """New output of one request."""

    key: int
    tokens: list[int] = []
    text: str = ""
    finish: FinishReason | None = None
    stop: str | int | None = None
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: bytes = b""
    """The packed error that ends the request."""
    misrouted: bool = False
    """Whether the replica lacks the adapter that the gateway believed it to have."""
    pooled: list[float] | None = None
    content: str = ""
    """In the first one: digest of the content that it runs on (``RequestOutput.adapter_digest``)."""


class Residency(msgspec.Struct, array_like=True):
    """Adapters that a replica holds; sent when they have changed."""

    slots: list[SlotInfo]
    adapters: list[AdapterInfo]
    """Current versions in memory."""
    replaced: list[AdapterInfo] = []
    """Replaced versions that requests still need there, wherever they are."""

    @property
    def versions(self) -> list[AdapterInfo]:
        return [*self.adapters, *self.replaced]

    @property
    def tiers(self) -> Tiers:
        """Where the current version of each adapter is; older ones only finish requests."""
        held: dict[AdapterLocation, list[str]] = {"slot": [], "cpu": [], "loading": [], "disk": []}
        for info in self.adapters:
            held[info.location].append(info.name)
        nbytes = {info.name: info.bytes for info in self.adapters if info.bytes and info.location != "disk"}
        return Tiers(held["slot"], held["cpu"], held["loading"], nbytes)


class Status(msgspec.Struct, array_like=True):
    """State of a replica."""

    report: Report
    """For routers, without ``tiers``."""
    step_age: float
    draining: bool
    state: str
    """State of the engine."""


class Hello(msgspec.Struct, array_like=True):
    """A replica's first message."""

    replica: str
    pid: int
    node: str
    slots: int
    cpu_loras: int
    max_running: int
    kv_tokens: int


class Frame(msgspec.Struct, array_like=True, omit_defaults=True):
    deltas: list[Delta] = []
    status: Status | None = None
    residency: Residency | None = None
    hello: Hello | None = None


encode_frame: Callable[[Frame], bytes]
encode_orders: Callable[[Sequence[Order | msgspec.Raw]], bytes]
encode_frame = encode_orders = _encode = msgspec.msgpack.Encoder(enc_hook=plain).encode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
decode_orders = msgspec.msgpack.Decoder(list[Order]).decode


def encode_order(order: Order) -> msgspec.Raw:
    """Encode an order for a later batch. Raises what msgspec raises for what cannot be sent, such as a number
    of more than 64 bits."""
    return msgspec.Raw(_encode(order))


def gone(adapter: str) -> AdapterNotFound:
    """Make the error for a version that no request runs on any more."""
    why = "this version is gone: it was replaced, and its last request has ended"
    return AdapterNotFound(why, name=adapter)
