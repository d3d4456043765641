"""Charts as Vega-Lite specifications: plain data that hold what they show."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.workload.extra import needs_extra

if TYPE_CHECKING:
    import polars as pl

Spec = dict[str, Any]
"""A specification, or a part of one."""
Row = Mapping[str, Any]

VERSION = "6.1"
"""Vega-Lite's."""
WIDTH = 450
"""Of the panels of a chart, in pixels."""
MAX_POINTS = 300
"""Maximum points of a line; more cannot be told apart at this width."""
TITLE_CHARACTERS = 72
"""Of a line of a title."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d46")
"""Colours that people with all kinds of colour vision can tell apart (Okabe and Ito, Color Universal Design,
2008, less their yellow and black)."""
NEUTRAL = "#a9b0bb"
CONFIG: Spec = {
    "background": "#ffffff",
    "view": {"stroke": None},
    "axis": {
        "domainColor": "#c4cad4",
        "gridColor": "#e3e6eb",
        "tickColor": "#c4cad4",
        "titleFontWeight": "normal",
    },
    "title": {"anchor": "start", "fontSize": 13, "subtitleFontSize": 11},
    "header": {"labelAnchor": "start", "labelFontWeight": "bold", "title": None},
    "legend": {"orient": "top", "title": None, "columns": 4, "symbolLimit": 40},
    "range": {"category": list(PALETTE)},
    "line": {"strokeWidth": 2},
    "point": {"filled": True, "size": 60},
}
"""Looks that all charts share on paper; a page may have others."""


class Figure(NamedTuple):
    """A chart, and the text that goes with it."""

    name: str
    """Name of its file, without ".png"."""
    title: str
    """What is to be seen, in a sentence."""
    spec: Spec
    caption: str
    """How to read it."""

    def whole(self) -> Spec:
        """Return a specification that needs nothing else."""
        return {
            "$schema": f"https://vega.github.io/schema/vega-lite/v{VERSION}.json",
            "title": {"text": wrap(self.title, TITLE_CHARACTERS)},
            **self.spec,
        }


def caption_of(draw: Callable[..., object]) -> str:
    """Return the caption of a figure, which is the docstring of what draws it."""
    return " ".join((draw.__doc__ or "").split())


def images(figure: Figure, kinds: Iterable[str]) -> dict[str, bytes]:
    """Draw a figure as files of these kinds: "png" and "svg", which are the same bytes each time, and "pdf",
    whose fonts are embedded."""
    with needs_extra():
        import vl_convert
    text = json.dumps({**figure.whole(), "config": CONFIG})
    found: dict[str, bytes] = {}
    for kind in kinds:
        if kind == "png":
            found[kind] = vl_convert.vegalite_to_png(text, vl_version=VERSION, scale=2.0)
        elif kind == "pdf":
            found[kind] = vl_convert.vegalite_to_pdf(text, vl_version=VERSION)
        else:
            found[kind] = vl_convert.vegalite_to_svg(text, vl_version=VERSION).encode()
    return found


def script() -> str:
    """Return the JavaScript that draws specifications in a page without a network: ``vegaEmbed``."""
    with needs_extra():
        import vl_convert
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed", vl_version=VERSION))


# Parts of specifications


def data(rows: Iterable[Row]) -> Spec:
    return {"values": [{key: _plain(value) for key, value in row.items()} for row in rows]}


def _plain(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def field(name: str, kind: str = "quantitative", title: str | None = None, **more: Any) -> Spec:
    """Return an encoding of a column; ``more`` are its other properties. Without a title it has none."""
    return {"field": name, "type": kind, "title": title, **more}


def number(name: str, title: str | None, unit: str = "number", **more: Any) -> Spec:
    """Return an encoding of numbers; those of the unit "share" are written in percent."""
    axis = {"format": ".3~%" if unit == "share" else ",.6~g"}
    return field(name, title=title, axis=axis, **more)


def logarithmic(name: str, title: str, **more: Any) -> Spec:
    return number(name, f"{title} (logarithmic)", scale={"type": "log"}, **more)


def color(name: str, order: Sequence[str], colors: Sequence[str] | None = None) -> Spec:
    """Return an encoding by colours in this order of values, which is that of the legend."""
    scale: Spec = {"domain": list(order)}
    if colors is not None:
        scale["range"] = list(colors)
    return field(name, "nominal", scale=scale)


def panel(height: int, *layers: Spec, **more: Any) -> Spec:
    """Return a chart of layers, each a mark with its encoding."""
    shape = {"width": WIDTH, "height": height, **more}
    return {**layers[0], **shape} if len(layers) == 1 else {"layer": list(layers), **shape}


def mark(kind: str, encoding: Spec, **looks: Any) -> Spec:
    return {"mark": {"type": kind, **looks}, "encoding": encoding}


def note(text: str) -> Spec:
    """Return a chart that only says something, because there are no data."""
    return {"data": {"values": [{}]}, "mark": {"type": "text", "text": text}, "width": WIDTH, "height": 60}


def shares_up_to(values: pl.Series, **labels: Any) -> list[Row]:
    """Return the points of a distribution: the share of the values up to each, at most ``MAX_POINTS``."""
    ordered = values.drop_nulls().sort()
    count = len(ordered)
    kept = (
        range(count)
        if count <= MAX_POINTS
        else (i * (count - 1) // (MAX_POINTS - 1) for i in range(MAX_POINTS))
    )
    # A logarithmic axis has no zero.
    return [{"value": max(ordered[i], 1e-5), "share": (i + 1) / count, **labels} for i in kept]


def distributions(
    rows: Sequence[Row], names: Sequence[str], axis: str, column: str = "name", **more: Any
) -> Spec:
    """Return a chart of distributions, from rows of :func:`shares_up_to`; ``column`` says whose they are."""
    encoding = {
        "x": logarithmic("value", axis),
        "y": number("share", "share of requests", "share", scale={"domain": [0, 1]}),
        "color": color(column, names),
        "strokeDash": {"field": column, "type": "nominal", "scale": {"domain": list(names)}},
    }
    return {"data": data(rows), **panel(220, mark("line", encoding, interpolate="step-after"), **more)}
