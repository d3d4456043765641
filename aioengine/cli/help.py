"""Layout of help pages: the most used flags on one screen, the rest with ``--help-all``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts.help import DefaultFormatter, PanelSpec
from rich.box import SIMPLE
from rich.text import Text

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

FOLDED = "More"
"""Groups of flags whose name begins so are shown by ``--help-all`` only."""

HELP_FLAGS = ("--help", "-h")
HELP_ALL = "--help-all"

EXIT_CODES = """\
Exit codes: 0 done; 1 some of it failed; 2 wrong usage or configuration, nothing was run;
3 a run of the lab is not valid, or a policy failed its check; 130 interrupted;
141 the reader of the output has gone."""


class CompactFormatter(DefaultFormatter):
    """Two columns without boxes. ``full``: show folded groups as well."""

    def __init__(self, *, full: bool) -> None:
        super().__init__(panel_spec=PanelSpec(box=SIMPLE))
        self._full = full

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        if self._full or not str(panel.title).startswith(FOLDED):
            super().__call__(console, options, panel)

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        """Render the paragraphs, whose lines are as in a docstring, in lines of the console's width."""
        paragraphs = str(getattr(description, "primary_renderable", description)).strip().split("\n\n")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        super().render_description(console, options, Text(f"{text}\n"))


def shown_default(value: Any) -> str | None:
    """Return how help shows a default; None: it says nothing."""
    says = isinstance(value, str | int | float | Path) and not isinstance(value, bool)
    return str(value) if says and value not in ("", "auto") else None
