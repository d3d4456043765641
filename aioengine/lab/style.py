"""How the lab's figures look: two themes, one layout, and bytes that depend on nothing but the data."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.extra import needs_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2
"""Inches; the same for all, so that text is as large in one figure as in the next."""
DPI = 160
TITLE_SIZE = 11.5
"""Points."""
MAX_POINTS = 600
"""Of a line: more than that cannot be told apart at this width."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours. The palettes are Okabe and Ito's for all kinds of colour vision (Color Universal Design,
    2008), less its yellow and black, in shades that stand out from the background."""

    name: str
    background: str
    text: str
    muted: str
    grid: str
    neutral: str
    """For what is there, and not pointed at."""
    palette: Sequence[str]
    levels: Sequence[str]
    """Where an adapter was found: slot, CPU, loading, disk."""


LIGHT = Theme(
    name="light",
    background="#ffffff",
    text="#1b2230",
    muted="#586173",
    grid="#e3e6eb",
    neutral="#c4cad4",
    palette=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d46"),
    levels=("#0072b2", "#7cc1ea", "#f3c766", "#d55e00"),
)
DARK = Theme(
    name="dark",
    background="#171b22",
    text="#e7eaf0",
    muted="#9aa4b5",
    grid="#2b313c",
    neutral="#4a5364",
    palette=("#4aa8e0", "#f08a4b", "#3ccf9f", "#e39ac4", "#f2bf4d", "#8fd0f5", "#b39ad6", "#c2a57f"),
    levels=("#2f86c4", "#8fd0f5", "#f2cf7d", "#e8743b"),
)
THEMES = (LIGHT, DARK)


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Inside, figures are made in the theme, whatever the user's own settings are."""
    with needs_extra():
        import matplotlib
    settings: Any = {  # its keys are typed as literals, all of them
        **dict[str, Any](matplotlib.rcParamsDefault.items()),
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlecolor": theme.text,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.text,
        "text.parse_math": False,  # names of adapters are no formulas
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "font.family": ["DejaVu Sans"],  # it comes with matplotlib: the same on every machine
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.labelsize": 10,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "legend.borderpad": 0,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "hatch.linewidth": 0.6,
        "figure.constrained_layout.w_pad": 0.08,
        "figure.constrained_layout.h_pad": 0.06,
        "agg.path.chunksize": 10_000,
    }
    # What chooses the program's backend is no business of a figure's style.
    for name in [name for name in settings if name.startswith(("backend", "interactive", "toolbar"))]:
        del settings[name]
    with matplotlib.rc_context(settings):
        yield


def new_figure(title: str, *, height: float, rows: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A figure with one column of ``rows`` axes.

    Args:
        title: What is seen, in a sentence; broken into lines as needed.
        height: Inches.
        kwargs: For ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    margin = 0.012
    text = "\n".join(_wrapped(title, TITLE_SIZE, points=WIDTH * 72 * (1 - 4 * margin)))
    figure.suptitle(text, x=margin, ha="left", fontsize=TITLE_SIZE, fontweight="bold")
    axes = figure.subplots(rows, 1, squeeze=False, **kwargs)
    return figure, [row[0] for row in axes]


def _wrapped(text: str, size: float, *, points: float) -> list[str]:
    """Lines of bold text that are hardly wider than that (pixels make it a little so), as far as single words
    are not."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight="bold")
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        width, _, _ = text_to_path.get_text_width_height_descent(longer, font, ismath=False)
        if lines and width <= points:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


class Drawn(NamedTuple):
    """A figure on its way into files and pages."""

    name: str
    title: str
    caption: str
    png: bytes


def draw(name: str, caption: str, theme: Theme, make: Callable[[], Figure]) -> Drawn:
    """The figure that ``make`` makes, as a PNG without a date or the name of the program in it, so that the
    same figure is the same bytes."""
    file = io.BytesIO()
    with drawing(theme):
        figure = make()
        figure.savefig(file, format="png", metadata={"Software": None})
    return Drawn(name, " ".join(figure.get_suptitle().split()), caption, file.getvalue())


def legend_above(axes: Axes, **kwargs: Any) -> None:
    """Entries in a row between title and axes, where they cover nothing."""
    given: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0.0, 1.0),
        "ncols": 6,
        "handlelength": 1.2,
        "columnspacing": 1.4,
        "handletextpad": 0.5,
        **kwargs,
    }
    axes.legend(**given)


def say(axes: Axes, text: str) -> None:
    """What stands in axes that have nothing to show."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def plain_log_axis(axis: Any) -> None:
    """0.01, 0.1, 1, 10 instead of powers of ten; with 2 and 5 between them where there are few. Call it when
    the data is there."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 100 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def thousands_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def seconds_text(seconds: float | None) -> str:
    """ "12 ms", "0.34 s", "5.1 s", "98 s"; "-" for None."""
    if seconds is None:
        return "–"
    if seconds < 0.0995:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.00995 else f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    return f"{seconds:,.0f} s"


def share_text(share: float | None) -> str:
    """A share in percent: "84%", "0.4%"; "-" for None."""
    if share is None:
        return "–"
    percent = share * 100
    return f"{percent:.1f}%" if 0 < percent < 9.95 or 99.05 <= percent < 99.95 else f"{percent:.0f}%"


def policy_label(policy: str) -> str:
    """A policy's name that fits; of one in a file, without the folders."""
    return shorten(policy.rpartition("/")[2], 26)


def shorten(name: str, width: int = 18) -> str:
    """A name that fits; its end is what tells "adapter-012" from others, so the middle goes."""
    name = "".join(char if char.isprintable() else "?" for char in name)
    if len(name) <= width:
        return name
    return f"{name[: width // 2 - 1]}…{name[-(width - width // 2) :]}"
