"""Choice of the adapter that a request asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from aioengine.errors import ConfigError
from aioengine.lab.workload.random_streams import Weighted, exponential, shuffle, stream
from aioengine.lab.workload.spec_text import Form, Option, parse_form

_ALPHA = Option(low=0.0, high=100.0, above=False)
FORMS = {
    "uniform": {},
    "zipf": {"alpha": _ALPHA},
    "power": {"alpha": Option(low=0.0, high=100.0)},
    "shift": {"alpha": _ALPHA._replace(default=1.0), "every": Option(60.0, low=1e-3, above=False)},
    "drift": {"alpha": _ALPHA._replace(default=1.0), "every": Option(10.0, low=1e-3, above=False)},
    "flip": {"alpha": _ALPHA._replace(default=1.0), "every": Option(300.0, low=1e-3, above=False)},
    "tenant": {"alpha": _ALPHA._replace(default=0.0)},
}


Popularity = Callable[[float, int], int]
"""Draws the index of the adapter for a request at a time (seconds, which never go back) of the tenant with a
number."""


def zipf(count: int, alpha: float) -> list[float]:
    """Return shares of which the i-th is proportional to 1 / i^alpha; with 0 all are equal."""
    weights = [float(i) ** -alpha for i in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def power(count: int, alpha: float) -> list[float]:
    """S-LoRA's power law (arXiv 2311.03285): the i-th of n is drawn where x in ((i-1)/n, i/n], and x has the
    density alpha x^(alpha-1) on 0..1. So 1 makes them equal, and less favours the first; that is how the
    authors' benchmark draws adapters (``numpy.random.power``)."""
    return [((i + 1) / count) ** alpha - (i / count) ** alpha for i in range(count)]


def parse_popularity(field: str, text: str) -> Form:
    """Parse "uniform", "zipf:1.0", "power:alpha=0.5", "shift:alpha=1.0,every=60",
    "drift:alpha=1.0,every=10", "flip:alpha=1.0,every=300" or "tenant". Raises ConfigError."""
    return parse_form(field, text, FORMS)


def make_popularity(form: Form, count: int, tenants: int, seed: int) -> Popularity:
    """Over ``count`` adapters (>= 1). ConfigError if there are too few for "tenant"."""
    name, values = form
    rng = stream(seed, "popularity")
    if name == "tenant":
        check_tenants(count, tenants)
        return _of_tenants(count, tenants, values["alpha"], rng)
    shares = power if name == "power" else zipf
    table = Weighted(shares(count, values.get("alpha", 0.0)))
    changes = {"shift": _shifting, "drift": _drifting, "flip": _flipping}
    if name not in changes:
        return lambda time, tenant: table.draw(rng)
    order_at = changes[name](count, values["every"], stream(seed, "popularity shifts"))
    return lambda time, tenant: order_at(time)[table.draw(rng)]


def _of_tenants(count: int, tenants: int, alpha: float, rng: Random) -> Popularity:
    """Give every tenant adapters of its own: adapter i is tenant (i mod tenants)'s."""
    tables = [Weighted(zipf(len(range(tenant, count, tenants)), alpha)) for tenant in range(tenants)]
    return lambda time, tenant: tenant + tenants * tables[tenant].draw(rng)


OrderAt = Callable[[float], Sequence[int]]
"""Returns the order of popularity at a time, which never goes back from call to call."""


def _shifting(count: int, every: float, rng: Random) -> OrderAt:
    """Shuffle the order after exponential times of the mean ``every`` seconds. The state is a Markov chain,
    and the requests for one adapter are modulated by it."""
    order = list(range(count))
    upcoming = exponential(rng) * every

    def order_at(time: float) -> list[int]:
        nonlocal upcoming
        if time >= upcoming:
            # Dealing once is as good as several times: nobody saw what was in between.
            while time >= upcoming:
                upcoming += exponential(rng) * every
            shuffle(rng, order)
        return order

    return order_at


def _drifting(count: int, every: float, rng: Random) -> OrderAt:
    """Have two neighbours in the order, drawn at random, change places every ``every`` seconds."""
    order, done = list(range(count)), 0

    def order_at(time: float) -> list[int]:
        nonlocal done
        while done < time // every and count > 1:
            place = int(rng.random() * (count - 1))
            order[place], order[place + 1] = order[place + 1], order[place]
            done += 1
        return order

    return order_at


def _flipping(count: int, every: float, rng: Random) -> OrderAt:
    """Reverse the order every ``every`` seconds: the favourite of one time is the last of the next."""
    there, back = range(count), range(count - 1, -1, -1)
    return lambda time: back if time // every % 2 else there


def check_tenants(count: int, tenants: int) -> None:
    """Raise ConfigError if not every tenant could have an adapter of its own."""
    if not 1 <= tenants <= count:
        raise ConfigError(
            f"popularity='tenant' with tenants={tenants} and adapters={count}: every tenant must have an "
            "adapter of its own; give 1 <= tenants <= adapters"
        )


class TenantBursts:
    """Tenants that send ``factor`` times as much for a while, each at times of its own: exponential times, of
    the means ``on`` and ``off`` seconds. So the requests for all adapters of a tenant rise and fall
    together."""

    def __init__(self, weights: list[float], form: Form, seed: int) -> None:
        self._weights = weights
        self._factor, self._on, self._off = (form.values[key] for key in ("factor", "on", "off"))
        self._rng = stream(seed, "tenant bursts")
        self._bursting = [False] * len(weights)
        self._changes = [exponential(self._rng) * self._off for _ in weights]
        self._next = min(self._changes)
        self._table = Weighted(weights)

    def table(self, time: float) -> Weighted:
        """Return the shares of the tenants at a time, which never goes back from call to call."""
        if time >= self._next:
            for index, at in enumerate(self._changes):
                while at <= time:
                    self._bursting[index] = not self._bursting[index]
                    at += exponential(self._rng) * (self._on if self._bursting[index] else self._off)
                self._changes[index] = at
            self._next = min(self._changes)
            pairs = zip(self._weights, self._bursting, strict=True)
            weights = [weight * (self._factor if bursting else 1.0) for weight, bursting in pairs]
            total = sum(weights)
            self._table = Weighted([weight / total for weight in weights])
        return self._table


BURST_FORMS = {
    "bursts": {
        "factor": Option(5.0, low=1.0, high=1e6, above=False),
        "on": Option(10.0, low=1e-3, above=False),
        "off": Option(60.0, low=1e-3, above=False),
    }
}


def parse_bursts(field: str, text: str) -> Form:
    """Parse "bursts:factor=5,on=10,off=60". Raises ConfigError."""
    return parse_form(field, text, BURST_FORMS)
