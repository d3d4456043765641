"""A report: figures as files, and one page that holds all of it and needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.errors import ConfigError
from aioengine.lab.report.charts import Figure, config, images, script

if TYPE_CHECKING:
    from jinja2 import Template


def write_report_files(
    folder: Path,
    name: str,
    figures: Sequence[Figure],
    settings: Mapping[str, Any],
    *,
    vector: bool,
    **values: Any,
) -> Path:
    """Write ``report.html`` from the template of this name, and the figures as PNG; with ``vector``, for a
    paper, as PDF and SVG too, and captions that name the ``settings``. Raises ConfigError if that fails."""
    kinds = ("png", "pdf", "svg") if vector else ("png",)
    drawn = folder / "figures"
    try:
        drawn.mkdir(exist_ok=True)
        for figure in figures:
            for kind, image in images(figure, kinds).items():
                (drawn / f"{figure.name}.{kind}").write_bytes(image)
        if vector:
            captions = [f"**{figure.name}.** {figure.title}. {figure.caption}\n" for figure in figures]
            captions.append(f"All with: `{json.dumps(settings, sort_keys=True, ensure_ascii=False)}`\n")
            (drawn / "captions.md").write_text("\n".join(captions), encoding="utf-8")
        page = template(name).render(
            **values,
            script=script(),
            figures=figures,
            charts={"config": config(), "charts": [figure.spec for figure in figures]},
            parameters=list(parameter_rows(settings)),
        )
        (folder / "report.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report into {folder}: {error.strerror}") from error
    return folder / "report.html"


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
