"""Choice of the adapter that a request asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from aioengine.lab.workload.arrivals import Spell
from aioengine.lab.workload.forms import Form, parse_form
from aioengine.lab.workload.random_streams import Weighted, exponential, shuffle, stream

Alpha = Annotated[float, Meta(ge=0, le=100)]
Choose = Callable[[float], int]
"""Draws the index of the adapter for a request at a time, in seconds, which never go back."""


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

    def chooser(self, count: int, seed: int) -> Choose:
        """Return what draws one of ``count`` adapters (>= 1)."""
        rng, table = stream(seed, "popularity"), Weighted(self.shares(count))
        return lambda time: table.draw(rng)


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

    def chooser(self, count: int, seed: int) -> Choose:
        place, shifts = super().chooser(count, seed), stream(seed, "popularity shifts")
        order, upcoming = list(range(count)), exponential(shifts) * self.every

        def choose(time: float) -> int:
            nonlocal upcoming
            if time >= upcoming:
                # Dealing once is as good as several times: nobody saw what was in between.
                while time >= upcoming:
                    upcoming += exponential(shifts) * self.every
                shuffle(shifts, order)
            return order[place(time)]

        return choose


FORMS: dict[str, type[Popularity]] = {
    "uniform": Popularity,
    "zipf": Zipf,
    "power": Power,
    "shift": Shift,
}


def parse_popularity(field: str, text: str) -> Popularity:
    """Parse "uniform", "zipf:1.0", "power:alpha=0.5" or "shift:alpha=1.0,every=60". Raises
    ConfigError."""
    return parse_form(field, text, FORMS)
