"""Clients: who sends a request, what they may use, and within which limits."""

from __future__ import annotations

import base64
import binascii
import contextlib
import fnmatch
import hashlib
import math
import re
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from aioengine.runtime.client import Usage
from aioengine.server.access.keys import Limits
from aioengine.server.errors import ApiError

_WILD = re.compile(r"[*?\[]")


class Bucket:
    """A token bucket: it holds an allowance of one minute, is full at first, and fills evenly. None: it never
    gets empty."""

    def __init__(self, per_minute: int | None = None) -> None:
        self.per_minute = per_minute
        self._each = 0.0 if per_minute is None else 60 / per_minute
        """Seconds in which 1 is filled in."""
        self._empty = -math.inf
        """When it was empty, or will be: then it has a debt."""

    def wait(self, now: float) -> float:
        """Return the seconds until 1 can be taken; 0 if it can be now."""
        return max(0.0, self._filled_since(now) + self._each - now)

    def take(self, amount: int, now: float) -> None:
        """Take an amount. More than is there becomes a debt, which must fill up before anything can be taken
        again."""
        self._empty = self._filled_since(now) + amount * self._each

    def _filled_since(self, now: float) -> float:
        return max(self._empty, now - 60)


class Meter:
    """Usage of one key or tenant. ``name`` is its name in errors."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self.active = self._told_active = 0
        """Number of open requests."""
        self.elsewhere = 0
        """Requests that other gateways to the same fleet are answering."""
        self._new_requests = self._new_tokens = 0
        self._requests, self._tokens = Bucket(limits.requests_per_minute), Bucket(limits.tokens_per_minute)

    def check(self, now: float) -> None:
        """Raise ApiError (429) if no request may begin."""
        most = self.limits.max_concurrent
        if most is not None and self.active + self.elsewhere >= most:
            raise self._refusal(f"{most} requests at once", 1)
        if seconds := self._requests.wait(now):
            raise self._refusal(f"{self._requests.per_minute} requests per minute", seconds)
        self.check_tokens(now)

    def check_tokens(self, now: float) -> None:
        """Raise ApiError (429) if no tokens are left."""
        if seconds := self._tokens.wait(now):
            raise self._refusal(f"{self._tokens.per_minute} tokens per minute", seconds)

    def begin(self, now: float) -> None:
        self.active += 1
        self._new_requests += 1
        self._requests.take(1, now)

    def spend(self, tokens: int, now: float) -> None:
        self._new_tokens += tokens
        self._tokens.take(tokens, now)

    def take_usage(self) -> Usage | None:
        """Return what is new since the last call; None if nothing is."""
        if not (self._new_requests or self._new_tokens or self.active != self._told_active):
            return None
        usage = Usage(self._new_requests, self._new_tokens, self.active)
        self._new_requests = self._new_tokens = 0
        self._told_active = self.active
        return usage

    def used_elsewhere(self, usage: Usage, now: float) -> None:
        """Count what other gateways have let in."""
        self.elsewhere = usage.active
        self._requests.take(usage.requests, now)
        self._tokens.take(usage.tokens, now)

    def _refusal(self, what: str, seconds: float) -> ApiError:
        wait = max(1, math.ceil(seconds))
        text = f"{self.name} may have {what}; try again in {wait} s"
        return ApiError(429, text, code="rate_limit_exceeded", retry_after=wait)


class Admission:
    """One request on its meters. Raises ApiError (429) if one of them has no room; then none counts it.

    Tokens are charged when they are known: the prompt's before it runs, the output's at the end.
    """

    def __init__(self, meters: Sequence[Meter], now: float) -> None:
        for meter in meters:
            meter.check(now)
        self._meters = meters
        self._charged = 0
        for meter in meters:
            meter.begin(now)

    def charge_prompt(self, tokens: int, now: float) -> None:
        """Charge the prompt's tokens. Raises ApiError (429) if other requests have used up the allowance
        since it arrived."""
        for meter in self._meters:
            meter.check_tokens(now)
        self._charge(tokens, now)

    def end(self, tokens: int, now: float) -> None:
        """End the request. ``tokens`` counts prompt and output together."""
        self._charge(tokens, now)
        for meter in self._meters:
            meter.active -= 1

    def _charge(self, tokens: int, now: float) -> None:
        for meter in self._meters:
            meter.spend(tokens - self._charged, now)
        self._charged = tokens


class AllowedModels:
    """The models that a key may use.

    Args:
        adapters: Names, or patterns with ``*``, ``?`` and ``[...]``.
        base_model: Whether the base model is allowed by itself.
    """

    def __init__(self, adapters: Sequence[str] = ("*",), base_model: bool = True) -> None:
        self._base_model = base_model
        self._names = frozenset(name for name in adapters if _WILD.search(name) is None)
        patterns = [fnmatch.translate(name) for name in adapters if _WILD.search(name) is not None]
        self._patterns = re.compile("|".join(patterns) or "(?!)")

    def allow(self, adapter: str | None) -> bool:
        """Whether the adapter is allowed; None is the base model."""
        if adapter is None:
            return self._base_model
        return adapter in self._names or self._patterns.match(adapter) is not None


class Identity(NamedTuple):
    """The client that sends a request."""

    tenant: str | None = None
    """Tenant of the key; None without a known key."""
    scopes: frozenset[str] = frozenset()
    models: AllowedModels | None = None
    """None: all."""
    meters: tuple[Meter, ...] = ()
    """The meters that its requests count on."""
    expires: float | None = None
    """Unix time."""

    @property
    def is_valid(self) -> bool:
        """Whether its key has not expired."""
        return self.expires is None or time.time() < self.expires


def hash_key(key: str | bytes) -> str:
    """Return the hash that stands for ``key`` in a keys file."""
    return f"sha256:{hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()}"


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key that a request has: as ``Authorization: Bearer KEY``; as ``x-api-key: KEY``, which is
    what Anthropic's clients send; or as the password of Basic, which is what a browser can send for the live
    page."""
    values = {name.lower(): value.strip() for name, value in headers}
    scheme, _, rest = values.get(b"authorization", b"").partition(b" ")
    match scheme.lower():
        case b"":
            return values.get(b"x-api-key") or None
        case b"bearer":
            return rest.strip() or None
        case b"basic":
            with contextlib.suppress(binascii.Error):
                return base64.b64decode(rest.strip(), validate=True).partition(b":")[2] or None
    return None
