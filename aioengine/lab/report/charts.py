"""Charts: Vega-Lite specifications in ``figures/``, filled with a run's or a comparison's tables.

A specification names its tables (``"data": {"name": "rows"}``); its description is the caption, and
``$value`` in its texts is replaced. The colours of ``config.json`` can be told apart by people with all kinds
of colour vision (Okabe and Ito, Color Universal Design, 2008, less their yellow and black).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.workload.extra import needs_extra

if TYPE_CHECKING:
    import polars as pl

VERSION = "6.1"
"""Vega-Lite's."""
MAX_POINTS = 300
"""Maximum points of a line; more cannot be told apart at its width."""
TITLE_CHARACTERS = 72
"""Of a line of a title."""
COLORS = 8
"""Number of colours."""
Row = Mapping[str, Any]


class Figure(NamedTuple):
    """A chart, and the text that goes with it."""

    name: str
    """Name of its file, without ".png"."""
    title: str
    """What is to be seen, in a sentence."""
    spec: dict[str, Any]
    """Specification that needs nothing else."""

    @property
    def caption(self) -> str:
        """How to read it."""
        return str(self.spec["description"])


def figure(
    name: str,
    title: str,
    rows: Iterable[Row] = (),
    *,
    words: Mapping[str, str | Sequence[str]] | None = None,
    **tables: Iterable[Row],
) -> Figure:
    """Fill the specification of this name.

    Args:
        rows: Its table ``rows``; others are in ``tables``.
        words: Texts, or lists of texts, for the specification's ``$names``.
    """
    spec = _read(name, words or {})
    filled = {
        table: [{key: _rounded(value) for key, value in row.items()} for row in values]
        for table, values in {"rows": rows, **tables}.items()
    }
    if not any(filled.values()):
        spec |= {"mark": {"type": "text", "text": "No data."}, "width": 450, "height": 60}
        for key in ("facet", "spec", "layer", "vconcat", "hconcat", "encoding", "resolve"):
            spec.pop(key, None)
        filled = {"rows": [{}]}
        spec["data"] = {"name": "rows"}
    schema = f"https://vega.github.io/schema/vega-lite/v{VERSION}.json"
    heading = {"text": wrap(title, TITLE_CHARACTERS)}
    return Figure(name, title, {"$schema": schema, "title": heading, **spec, "datasets": filled})


def _read(name: str, words: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
    text = (files("aioengine.lab.report") / "figures" / f"{name}.json").read_text(encoding="utf-8")
    # The quotes around a text, and those at the ends of a list, are there already.
    parts = {key: json.dumps(one).strip("[]")[1:-1] for key, one in words.items()}
    found = json.loads(Template(text).safe_substitute(parts))
    assert isinstance(found, dict)
    return found


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def config() -> dict[str, Any]:
    """Return the looks that all charts share on paper; a page may have others."""
    return _read("config", {})


def images(figure: Figure, kinds: Iterable[str]) -> dict[str, bytes]:
    """Draw a figure as files of these kinds: "png" and "svg", which are the same bytes each time, and "pdf",
    whose fonts are embedded."""
    with needs_extra():
        import vl_convert
    text = json.dumps({**figure.spec, "config": config()})
    draw = {
        "png": lambda: vl_convert.vegalite_to_png(text, vl_version=VERSION, scale=2.0),
        "pdf": lambda: vl_convert.vegalite_to_pdf(text, vl_version=VERSION),
        "svg": lambda: vl_convert.vegalite_to_svg(text, vl_version=VERSION).encode(),
    }
    return {kind: draw[kind]() for kind in kinds}


def script() -> str:
    """Return the JavaScript that draws specifications in a page without a network: ``vegaEmbed``."""
    with needs_extra():
        import vl_convert
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed", vl_version=VERSION))


def shares_up_to(values: pl.Series, **labels: Any) -> list[Row]:
    """Return the points of a distribution: the share of the values up to each, at most ``MAX_POINTS``."""
    ordered = values.drop_nulls().sort()
    count = len(ordered)
    points = min(count, MAX_POINTS)
    kept = [i * (count - 1) // max(points - 1, 1) for i in range(points)]
    # A logarithmic axis has no zero.
    return [{"value": max(ordered[i], 1e-5), "share": (i + 1) / count, **labels} for i in kept]
