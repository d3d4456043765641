"""Which adapter a request asks for."""

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
    "tenant": {"alpha": _ALPHA._replace(default=0.0)},
}


class Popularity(ABC):
    """Draws adapters by index. ``time`` never goes back from call to call."""

    @abstractmethod
    def draw(self, time: float, tenant: int) -> int:
        """For a request at ``time`` (seconds) of the ``tenant``-th tenant."""


class FixedPopularity(Popularity):
    """The same shares all along."""

    def __init__(self, shares: list[float], seed: int) -> None:
        self._table = Weighted(shares)
        self._rng = stream(seed, "popularity")

    def draw(self, time: float, tenant: int) -> int:
        return self._table.draw(self._rng)


class ShiftingPopularity(Popularity):
    """Who is popular changes: ranks are dealt anew after exponential times of the mean ``every`` seconds.
    The state is a Markov chain, and the requests for one adapter are modulated by it."""

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
    """The share of the i-th is in proportion to 1 / i^alpha; 0 makes them equal."""
    weights = [float(i) ** -alpha for i in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def power(count: int, alpha: float) -> list[float]:
    """S-LoRA's power law (arXiv 2311.03285): the i-th of n is drawn where x in ((i-1)/n, i/n], and x has the
    density alpha x^(alpha-1) on 0..1. So 1 makes them equal, and less favours the first; that is how the
    authors' benchmark draws adapters (``numpy.random.power``)."""
    return [((i + 1) / count) ** alpha - (i / count) ** alpha for i in range(count)]


def parse_popularity(field: str, text: str) -> Form:
    """ "uniform", "zipf:1.0", "power:alpha=0.5", "shift:alpha=1.0,every=60" or "tenant". ConfigError."""
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
        case "power":
            return FixedPopularity(power(count, values["alpha"]), seed)
        case _:
            return FixedPopularity(zipf(count, values.get("alpha", 0.0)), seed)


def check_tenants(count: int, tenants: int) -> None:
    """ConfigError if not every tenant could have an adapter of its own."""
    if not 1 <= tenants <= count:
        raise ConfigError(
            f"popularity='tenant' with tenants={tenants} and adapters={count}: every tenant must have an "
            "adapter of its own; give 1 <= tenants <= adapters"
        )
