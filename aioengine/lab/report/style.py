"""Style of the lab's figures: two themes, one layout, and files whose bytes depend only on the data."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.workload.extra import needs_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2
"""Width of a figure in inches; the same for all, so that text has the same size in all."""
DPI = 160
TITLE_SIZE = 11.5
"""Points."""
NOTE_SIZE = 9
MARGIN = 0.012
"""Left of titles and notes, as a share of the width."""
MAX_POINTS = 600
"""Maximum points of a line; more cannot be told apart at this width."""


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
    """Colour of things that are shown without emphasis."""
    palette: Sequence[str]
    levels: Sequence[str]
    """Colours of the places where an adapter was found: slot, CPU, loading, disk."""


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


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Context in which figures are drawn in the theme, independent of the user's matplotlib settings."""
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
        "ytick.minor.size": 0,
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
        "pdf.fonttype": 42,  # TrueType, which publishers ask for
        "svg.fonttype": "path",
        "svg.hashsalt": "aioengine",  # else ids are random
    }
    # What chooses the program's backend is no business of a figure's style.
    for name in [name for name in settings if name.startswith(("backend", "interactive", "toolbar"))]:
        del settings[name]
    with matplotlib.rc_context(settings):
        yield


def new_figure(
    title: str, *, height: float, rows: int = 1, columns: int = 1, **kwargs: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure with its axes, row by row.

    Args:
        title: What is seen, in a sentence; broken into lines as needed.
        height: Inches.
        kwargs: For ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    figure.suptitle(
        _wrapped(title, TITLE_SIZE, "bold"), x=MARGIN, ha="left", fontsize=TITLE_SIZE, fontweight="bold"
    )
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, [*axes.flat]


def footnote(figure: Figure, text: str, theme: Theme) -> None:
    """Write a note below the figure."""
    lines = _wrapped(text, NOTE_SIZE, "normal")
    figure.supxlabel(lines, x=MARGIN, ha="left", fontsize=NOTE_SIZE, color=theme.muted)


def _wrapped(text: str, size: float, weight: str) -> str:
    """Break a text into lines of about the figure's width less its margins, unless a single word is longer.
    The last line is never a single word."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    points = WIDTH * 72 * (1 - 4 * MARGIN)
    font = FontProperties(size=size, weight=weight)
    lines: list[str] = []
    for word in re.sub(r"(?<=\d) (?=m?s\b)", "\N{NO-BREAK SPACE}", text).split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        width, _, _ = text_to_path.get_text_width_height_descent(longer, font, ismath=False)
        if lines and width <= points:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 1 and " " not in lines[-1] and " " in lines[-2]:
        lines[-2], _, word = lines[-2].rpartition(" ")
        lines[-1] = f"{word} {lines[-1]}"
    return "\n".join(lines)


_UNDATED: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}
"""Kind -> metadata that hold no date and no program."""


class Drawn(NamedTuple):
    """A drawn figure: its PNG data, and the text that pages show with it."""

    name: str
    title: str
    caption: str
    png: bytes
    theme: Theme
    make: Callable[[], Figure]
    """Draws it again."""


def draw(name: str, caption: str, theme: Theme, make: Callable[[], Figure]) -> Drawn:
    """Return the figure that ``make`` makes, as a PNG without a date or the name of the program in it, so
    that the same figure is the same bytes."""
    file = io.BytesIO()
    with drawing(theme):
        figure = make()
        figure.align_ylabels()
        figure.savefig(file, format="png", metadata={"Software": None})
    title = " ".join(figure.get_suptitle().split())
    return Drawn(name, title, caption, file.getvalue(), theme, make)


def vectors(drawn: Drawn) -> dict[str, bytes]:
    """Return the figure as PDF, with its fonts embedded, and as SVG, with its letters as outlines; the same
    bytes each time. By kind: "pdf" and "svg"."""
    found: dict[str, bytes] = {}
    with drawing(drawn.theme):
        figure = drawn.make()
        figure.align_ylabels()
        for kind, metadata in _UNDATED.items():
            file = io.BytesIO()
            figure.savefig(file, format=kind, metadata=metadata)
            found[kind] = file.getvalue()
    return found


def legend_above(axes: Axes, **kwargs: Any) -> None:
    """Entries in rows between title and axes, where they cover nothing."""
    given: dict[str, Any] = {
        "loc": "lower left",
        "bbox_to_anchor": (0.0, 1.0),
        "ncols": 6,
        "handlelength": 1.2,
        "columnspacing": 1.4,
        "handletextpad": 0.5,
        **kwargs,
    }
    axes.legend(*in_rows(axes, given["ncols"]), **given)


def in_rows(axes: Axes, columns: int) -> tuple[list[Any], list[str]]:
    """Return the entries of a legend, so ordered that they are read row by row: it is filled column by
    column."""
    entries = [*zip(*axes.get_legend_handles_labels(), strict=True)]
    ordered = [entry for column in range(columns) for entry in entries[column::columns]]
    return [handle for handle, _ in ordered], [label for _, label in ordered]


def text_on(color: str, theme: Theme) -> str:
    """Return the one of the theme's text and background that is easier to read on the colour."""
    from matplotlib.colors import to_rgb

    def luminance(of: str) -> float:  # as WCAG 2 defines it
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(of)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(of: str) -> float:
        low, high = sorted((luminance(color), luminance(of)))
        return (high + 0.05) / (low + 0.05)

    return max(theme.text, theme.background, key=contrast)


def say(axes: Axes, text: str) -> None:
    """Write a text into axes that have no data."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)


def percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.6g}%".replace("-", "−")))


def plain_log_axis(axis: Any) -> None:
    """0.01, 0.1, 1, 10 instead of powers of ten; with 2 and 5 between them where there is room. Call it when
    the data is there."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 3e4 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def thousands_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


class Scale(NamedTuple):
    """A way to write numbers: their unit and decimals, which a mean and its interval share."""

    factor: float
    decimals: int
    unit: str

    def text(self, value: float) -> str:
        return f"{value * self.factor:,.{self.decimals}f}{self.unit}"


def digits_scale(value: float, digits: int, factor: float = 1, unit: str = "") -> Scale:
    """Return the scale that writes this many digits, or all digits before the decimal point."""
    exponent = int(f"{value * factor:.{digits - 1}e}".partition("e")[2])
    return Scale(factor, max(digits - 1 - exponent, 0) if value else 0, unit)


def seconds_scale(seconds: float) -> Scale:
    return digits_scale(seconds, 2, 1000, " ms") if seconds < 0.0995 else digits_scale(seconds, 2, 1, " s")


def share_scale(share: float) -> Scale:
    return Scale(100, int(0 < share < 0.0995 or 0.9905 <= share < 0.9995), "%")


def seconds_text(seconds: float | None) -> str:
    """ "12 ms", "0.34 s", "5.1 s", "98 s"; "-" for None."""
    return "–" if seconds is None else seconds_scale(seconds).text(seconds)


def share_text(share: float | None) -> str:
    """Return a share in percent: "84%", "0.4%"; "-" for None."""
    return "–" if share is None else share_scale(share).text(share)


def change_text(change: float) -> str:
    """Format a relative change: "+84%", "−0.4%", "±0%"."""
    text = share_text(abs(change))
    return "±0%" if text in ("0%", "0.0%") else f"{'+' if change > 0 else '−'}{text}"


def policy_label(policy: str) -> str:
    """Shorten a policy's name so that it fits; a path loses its folders."""
    return shorten(policy.rpartition("/")[2], 26)


def shorten(name: str, width: int = 18) -> str:
    """Shorten a name in its middle, because names often differ only at the end, as "adapter-012" does from
    others."""
    name = "".join(char if char.isprintable() else "?" for char in name)
    if len(name) <= width:
        return name
    return f"{name[: width // 2 - 1]}…{name[-(width - width // 2) :]}"
