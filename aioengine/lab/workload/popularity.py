"""Choice of the adapter that a request asks for, and of the tenant that asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from aioengine.errors import ConfigError
from aioengine.lab.workload.arrivals import Spell
from aioengine.lab.workload.forms import Form, parse_form
from aioengine.lab.workload.random_streams import Weighted, exponential, shuffle, stream

Alpha = Annotated[float, Meta(ge=0, le=100)]
Choose = Callable[[float, int], int]
"""Draws the index of the adapter for a request at a time (seconds, which never go back) of the tenant with a
number."""


def zipf(count: int, alpha: float) -> list[float]:
    """Return shares of which the i-th is proportional to 1 / i^alpha; with 0 all are equal."""
    weights = [float(i) ** -alpha for i in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


class Popularity(Form):
    """Shares of adapters; here all are equal."""

    def shares(self, count: int) -> list[float]:
        """Return the shares of ``count`` adapters, by their places in the order of popularity."""
        return zipf(count, 0.0)

    def chooser(self, count: int, tenants: int, seed: int) -> Choose:
        """Return what draws one of ``count`` adapters (>= 1). Raises ConfigError for "tenant" if there are
        too few."""
        rng, table = stream(seed, "popularity"), Weighted(self.shares(count))
        return lambda time, tenant: table.draw(rng)


class Zipf(Popularity):
    """Shares after Zipf's law."""

    alpha: Alpha

    def shares(self, count: int) -> list[float]:
        return zipf(count, self.alpha)


class Power(Popularity):
    """S-LoRA's power law (arXiv 2311.03285): the i-th of n is drawn where x in ((i-1)/n, i/n], and x has the
    density alpha x^(alpha-1) on 0..1. So 1 makes them equal, and less favours the first; that is how the
    authors' benchmark draws adapters (``numpy.random.power``)."""

    alpha: Annotated[float, Meta(gt=0, le=100)]

    def shares(self, count: int) -> list[float]:
        return [((i + 1) / count) ** self.alpha - (i / count) ** self.alpha for i in range(count)]


class Shift(Zipf):
    """Order that is shuffled after exponential times of the mean ``every`` seconds. The state is a Markov
    chain, and the requests for one adapter are modulated by it."""

    alpha: Alpha = 1.0
    every: Spell = 60.0

    def chooser(self, count: int, tenants: int, seed: int) -> Choose:
        place, shifts = super().chooser(count, tenants, seed), stream(seed, "popularity shifts")
        order, upcoming = list(range(count)), exponential(shifts) * self.every

        def choose(time: float, tenant: int) -> int:
            nonlocal upcoming
            if time >= upcoming:
                # Dealing once is as good as several times: nobody saw what was in between.
                while time >= upcoming:
                    upcoming += exponential(shifts) * self.every
                shuffle(shifts, order)
            return order[place(time, tenant)]

        return choose


class Tenant(Popularity):
    """Adapters of its own for every tenant: adapter i is tenant (i mod tenants)'s."""

    alpha: Alpha = 0.0

    def check(self, count: int, tenants: int) -> None:
        """Raise ConfigError if not every tenant could have an adapter of its own."""
        if not 1 <= tenants <= count:
            raise ConfigError(
                f"popularity='tenant' with tenants={tenants} and adapters={count}: every tenant must have an "
                "adapter of its own; give 1 <= tenants <= adapters"
            )

    def chooser(self, count: int, tenants: int, seed: int) -> Choose:
        self.check(count, tenants)
        rng = stream(seed, "popularity")
        tables = [Weighted(zipf(len(range(one, count, tenants)), self.alpha)) for one in range(tenants)]
        return lambda time, tenant: tenant + tenants * tables[tenant].draw(rng)


FORMS: dict[str, type[Popularity]] = {
    "uniform": Popularity,
    "zipf": Zipf,
    "power": Power,
    "shift": Shift,
    "tenant": Tenant,
}


def parse_popularity(field: str, text: str) -> Popularity:
    """Parse "uniform", "zipf:1.0", "power:alpha=0.5", "shift:alpha=1.0,every=60" or "tenant". Raises
    ConfigError."""
    return parse_form(field, text, FORMS)


class Bursts(Form):
    """Times at which tenants send ``factor`` times as much: exponential, of the means ``on`` and ``off``
    seconds."""

    factor: Annotated[float, Meta(ge=1, le=1e6)] = 5.0
    on: Spell = 10.0
    off: Spell = 60.0


def parse_bursts(field: str, text: str) -> Bursts:
    """Parse "bursts:factor=5,on=10,off=60". Raises ConfigError."""
    return parse_form(field, text, {"bursts": Bursts})


class TenantShares:
    """Shares of the tenants' requests over time. With bursts each tenant sends more at times of its own, so
    that the requests for all of its adapters rise and fall together."""

    def __init__(self, weights: list[float], bursts: Bursts | None, seed: int) -> None:
        self._weights = weights
        self._bursts = bursts
        self._table = Weighted(weights)
        self._rng = stream(seed, "tenant bursts")
        self._bursting = [False] * len(weights)
        self._changes = [
            float("inf") if bursts is None else exponential(self._rng) * bursts.off for _ in weights
        ]
        self._next = min(self._changes)

    def at(self, time: float) -> Weighted:
        """Return the shares at a time, which never goes back from call to call."""
        if self._bursts is not None and time >= self._next:
            self._change(self._bursts, time)
        return self._table

    def _change(self, bursts: Bursts, time: float) -> None:
        for index, at in enumerate(self._changes):
            while at <= time:
                self._bursting[index] = not self._bursting[index]
                at += exponential(self._rng) * (bursts.on if self._bursting[index] else bursts.off)
            self._changes[index] = at
        self._next = min(self._changes)
        pairs = zip(self._weights, self._bursting, strict=True)
        weights = [weight * (bursts.factor if bursting else 1.0) for weight, bursting in pairs]
        total = sum(weights)
        self._table = Weighted([weight / total for weight in weights])
