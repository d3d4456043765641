"""Layout of help pages: the most used flags on one screen, the rest with ``--help-all``."""

from __future__ import annotations

import io
import re
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

FOLDED = "More"
"""Groups of flags whose name begins so are shown by ``--help-all`` only."""

HELP_FLAGS = ("--help", "-h")
HELP_ALL = "--help-all"

EXIT_CODES = """\
Exit codes: 0 done; 1 some of it failed; 2 wrong usage or configuration, nothing was run;
3 a run of the lab is not valid, or a policy failed its check; 130 interrupted;
141 the reader of the output has gone."""


class CompactFormatter:
    """Two columns without boxes. A formatter of help pages for cyclopts.

    Args:
        full: Show folded groups as well.
    """

    def __init__(self, *, full: bool) -> None:
        self._full = full

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        entries = {
            _label(entry): entry for entry in panel.entries if HELP_FLAGS[0] not in entry.positive_names
        }
        if not entries or (str(panel.title).startswith(FOLDED) and not self._full):
            return
        _print(console, f"{panel.title}:", style="bold")
        indent = max(20, *map(len, entries)) + 4
        for label, entry in entries.items():
            text = textwrap.fill(
                with_default(" ".join(_plain(entry.description).split()), entry.default),
                width=max(console.width, indent + 30),
                initial_indent=f"  {label}".ljust(indent),
                subsequent_indent=" " * indent,
                break_on_hyphens=False,
            )
            _print(console, text or f"  {label}")

    def render_usage(self, console: Console, options: ConsoleOptions, usage: Any) -> None:
        text = _plain(usage).strip()
        _print(console, text if text.startswith("Usage:") else f"Usage: {text}", style="bold")

    def render_description(self, console: Console, options: ConsoleOptions, description: Any) -> None:
        paragraphs = _plain(description).strip().split("\n\n")
        text = "\n\n".join(textwrap.fill(" ".join(p.split()), min(console.width, 100)) for p in paragraphs)
        _print(console, f"\n{text}\n")


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _label(entry: HelpEntry) -> str:
    """ "--device auto|cpu|cuda", "--max-tokens INT", "--[no-]enable-prefix-caching", "PROMPT"."""
    if entry.positional_label is not None:
        return entry.positional_label
    names = [*entry.positive_shorts, *entry.positive_names]
    if entry.negative_names:
        names = [name.replace("--", "--[no-]", 1) for name in names]
    value = "|".join(entry.choices) if entry.choices else entry.metavar
    return ", ".join(names) + (f" {value}" if value else "")


def with_default(text: str, default: str | None) -> str:
    """Return the text with the default in brackets, if there is one and the text does not have it."""
    default = {"True": "yes", "False": None}.get(default or "", default)
    if not text or not default or "default" in text or default in re.split(r"[\s()\[\],;:]+", text):
        return text
    return f"{text.removesuffix('.')} ({default})."


def _plain(text: Any) -> str:
    """Return the plain text of what cyclopts passes: text, or something that rich can render."""
    if isinstance(text, str):
        return text
    from rich.console import Console

    drawn = io.StringIO()
    Console(width=10_000, file=drawn, color_system=None).print(text, highlight=False)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines())
