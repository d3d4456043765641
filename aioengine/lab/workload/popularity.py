"""Choice of the adapter that a request asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod

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


class Popularity(ABC):
    """Draws adapters by index. ``time`` never goes back from call to call."""

    @abstractmethod
    def draw(self, time: float, tenant: int) -> int:
        """Draw the adapter of a request at ``time`` (seconds) of the ``tenant``-th tenant."""


class FixedPopularity(Popularity):
    """Shares that do not change."""

    def __init__(self, shares: list[float], seed: int) -> None:
        self._table = Weighted(shares)
        self._rng = stream(seed, "popularity")

    def draw(self, time: float, tenant: int) -> int:
        return self._table.draw(self._rng)


class ShiftingPopularity(Popularity):
    """Popularity that changes at once: the order of popularity is shuffled after exponential times of the
    mean ``every`` seconds. The state is a Markov chain, and the requests for one adapter are modulated by
    it."""

    def __init__(self, shares: list[float], every: float, seed: int) -> None:
        self._table = Weighted(shares)
        self._every = every
        self._rng = stream(seed, "popularity")
        self._shifts = stream(seed, "popularity shifts")
        self._order = list(range(len(shares)))
        self._next = exponential(self._shifts) * every

    def draw(self, time: float, tenant: int) -> int:
        if time >= self._next:
            # Dealing once is as good as several times: nobody saw what was in between.
            while time >= self._next:
                self._next += exponential(self._shifts) * self._every
            shuffle(self._shifts, self._order)
        return self._order[self._table.draw(self._rng)]


class TenantPopularity(Popularity):
    """Every tenant has adapters of its own: adapter i is tenant (i mod tenants)'s."""

    def __init__(self, count: int, tenants: int, alpha: float, seed: int) -> None:
        self._tenants = tenants
        self._tables = [Weighted(zipf(len(range(t, count, tenants)), alpha)) for t in range(tenants)]
        self._rng = stream(seed, "popularity")

    def draw(self, time: float, tenant: int) -> int:
        return tenant + self._tenants * self._tables[tenant].draw(self._rng)


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
    match name:
        case "tenant":
            check_tenants(count, tenants)
            return TenantPopularity(count, tenants, values["alpha"], seed)
        case "shift":
            return ShiftingPopularity(zipf(count, values["alpha"]), values["every"], seed)
        case "drift":
            return DriftingPopularity(zipf(count, values["alpha"]), values["every"], seed)
        case "flip":
            return FlippingPopularity(zipf(count, values["alpha"]), values["every"], seed)
        case "power":
            return FixedPopularity(power(count, values["alpha"]), seed)
        case _:
            return FixedPopularity(zipf(count, values.get("alpha", 0.0)), seed)


def check_tenants(count: int, tenants: int) -> None:
    """Raise ConfigError if not every tenant could have an adapter of its own."""
    if not 1 <= tenants <= count:
        raise ConfigError(
            f"popularity='tenant' with tenants={tenants} and adapters={count}: every tenant must have an "
            "adapter of its own; give 1 <= tenants <= adapters"
        )


class DriftingPopularity(Popularity):
    """Popularity that changes little by little: every ``every`` seconds two neighbours in the order of
    popularity, drawn at random, change places."""

    def __init__(self, shares: list[float], every: float, seed: int) -> None:
        self._table = Weighted(shares)
        self._every = every
        self._rng = stream(seed, "popularity")
        self._swaps = stream(seed, "popularity shifts")
        self._order = list(range(len(shares)))
        self._done = 0

    def draw(self, time: float, tenant: int) -> int:
        order = self._order
        while self._done < time // self._every and len(order) > 1:
            place = int(self._swaps.random() * (len(order) - 1))
            order[place], order[place + 1] = order[place + 1], order[place]
            self._done += 1
        return order[self._table.draw(self._rng)]


class FlippingPopularity(Popularity):
    """Popularity whose order is reversed every ``every`` seconds: the favourite of one time is the last of
    the next."""

    def __init__(self, shares: list[float], every: float, seed: int) -> None:
        self._table = Weighted(shares)
        self._last = len(shares) - 1
        self._every = every
        self._rng = stream(seed, "popularity")

    def draw(self, time: float, tenant: int) -> int:
        place = self._table.draw(self._rng)
        return self._last - place if time // self._every % 2 else place


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
