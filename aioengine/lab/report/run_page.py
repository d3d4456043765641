"""A run's report: figures as PNG files, and a page that holds all of it in one file."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.checks import read_json
from aioengine.errors import ConfigError
from aioengine.lab.analysis.measures import MEASURES
from aioengine.lab.analysis.summary import flatten
from aioengine.lab.report.run_figures import draw_run, load_run
from aioengine.lab.report.style import DARK, LIGHT, Drawn, Theme, seconds_text, share_text, vectors
from aioengine.lab.report.timeline_page import timeline_page

if TYPE_CHECKING:
    from jinja2 import Template

Progress = Callable[[int, int], None]
"""Callback with the number of figures drawn, and their total."""

_SPREADS = (
    ("time to first token", "ttft_seconds"),
    ("whole answer", "latency_seconds"),
    ("between tokens", "inter_token_seconds"),
    ("worst gap between tokens", "worst_gap_seconds"),
    ("in the queue", "queue_seconds"),
    ("load from disk", "swaps.disk_load_seconds"),
    ("copy into a slot", "swaps.slot_copy_seconds"),
    ("stay in a slot", "slots.stay_seconds"),
)


def write_report(
    folder: str | Path, progress: Callable[[], None] | None = None, *, vector: bool = False
) -> Path:
    """Draw the figures of the run in ``folder`` and write ``figures/*.png``, ``report.html`` and
    ``timeline.html`` there.

    They depend on the run's files alone. Returns the page's path.

    Args:
        progress: Called for each figure that is drawn.
        vector: Write the figures as PDF and SVG too, and ``figures/captions.md`` with what each shows and all
            parameters.

    Raises ConfigError if a file of the run is missing or broken, or the report cannot be written.
    """
    folder = Path(folder)
    run = load_run(folder)
    experiment = read_json(folder / "experiment.json")
    summary = read_json(folder / "summary.json")
    parameters = experiment.get("experiment", {})
    drawn = draw_both(lambda theme: draw_run(run, theme), progress)
    flat = flatten(summary)
    page = template("run").render(
        title=f"{parameters.get('policy')} on {parameters.get('preset')}",
        subtitle=_subtitle(summary),
        tiles=list(_tiles(summary)),
        drawn=drawn,
        spreads=[(label, spread_texts(flat, name)) for label, name in _SPREADS],
        measures=[(measure.label, measure.text(flat.get(measure.name))) for measure in MEASURES],
        summary=json.dumps(summary, indent=2, ensure_ascii=False),
        parameters=list(parameter_rows(parameters)),
        versions=versions_text(experiment),
    )
    settings = parameters if vector else None
    title = f"Slots: {parameters.get('policy')} on {parameters.get('preset')}"
    slots = summary["slots"]["slots"]
    timeline = timeline_page(template("timeline"), run.frames.slots, slots, run.end, title=title)
    _write_text(folder / "timeline.html", timeline)
    return write_files(folder, page, [light for light, _ in drawn], settings)


def draw_both(
    draw_all: Callable[[Theme], Iterator[Drawn]], progress: Callable[[], None] | None = None
) -> list[tuple[Drawn, Drawn]]:
    """Draw each figure twice: for light and for dark pages."""
    both = []
    for pair in zip(draw_all(LIGHT), draw_all(DARK), strict=True):
        both.append(pair)
        if progress is not None:
            progress()
    return both


def write_files(
    folder: Path, page: str, drawn: Sequence[Drawn], settings: Mapping[str, Any] | None = None
) -> Path:
    """Write the page and its figures; with ``settings``, for a paper, figures as PDF and SVG too, and
    captions that name them. Raises ConfigError if that fails."""
    path = folder / "report.html"
    try:
        (folder / "figures").mkdir(exist_ok=True)
        for figure in drawn:
            (folder / "figures" / f"{figure.name}.png").write_bytes(figure.png)
            for kind, data in vectors(figure).items() if settings is not None else ():
                (folder / "figures" / f"{figure.name}.{kind}").write_bytes(data)
        if settings is not None:
            text = "\n".join(_captions(drawn, settings))
            (folder / "figures" / "captions.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report into {folder}: {error.strerror}") from error
    _write_text(path, page)
    return path


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report into {path.parent}: {error.strerror}") from error


def _captions(drawn: Sequence[Drawn], settings: Mapping[str, Any]) -> Iterator[str]:
    for figure in drawn:
        yield f"**{figure.name}.** {figure.title}. {figure.caption}\n"
    yield f"All with: `{json.dumps(settings, sort_keys=True, ensure_ascii=False)}`\n"


@cache
def template(name: str) -> Template:
    """Load a page template, which escapes all values that are put into it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("aioengine.lab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return pages.get_template(f"{name}.html.jinja")


def parameter_rows(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("workload.limit", "20000"), ...: what is nested by dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping) and key != "policy":
            yield from parameter_rows(value, f"{prefix}{key}.")
        elif value is not None:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def versions_text(values: Mapping[str, Any]) -> str:
    return f"aioengine {values.get('aioengine', '?')} and Python {values.get('python', '?')}"


def spread_texts(flat: Mapping[str, float | None], name: str) -> list[str]:
    return [seconds_text(flat.get(f"{name}.{part}")) for part in ("mean", "p50", "p90", "p99", "max")]


def _subtitle(summary: Mapping[str, Any]) -> str:
    parts = [
        f"{summary['requests_offered']:,} requests in {seconds_text(summary['duration_seconds'])}",
        f"{summary['fairness']['adapters']['count']:,} adapters in {summary['slots']['slots']:,} slots",
    ]
    bad = {name: summary[f"requests_{name}"] for name in ("refused", "failed", "aborted")}
    parts += [f"{count:,} {name}" for name, count in bad.items() if count]
    return ", ".join(parts)


def _tiles(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "requests finished", f"{summary['requests_finished']:,}"
    yield "output tokens a second", f"{summary['output_tokens_per_second'] or 0:,.0f}"
    yield "first token, median", seconds_text(summary["ttft_seconds"]["p50"])
    yield "first token, p99", seconds_text(summary["ttft_seconds"]["p99"])
    yield "between tokens, mean", seconds_text(summary["inter_token_seconds"]["mean"])
    yield "adapter was in a slot", share_text(summary["hits"]["slot_share"])
    if summary["slo"]["requests_with_deadline"]:
        yield "deadlines met", share_text(summary["slo"]["in_time_share"])
