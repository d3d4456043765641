"""Flags that every command has."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from aioengine.cli.help import FOLDED

_TROUBLE = Group(f"{FOLDED}: finding out what went wrong", sort_key=90)


@Parameter(name="*", group=_TROUBLE)
@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """Common flags. A command takes them in a parameter called ``common``, where ``main`` finds them."""

    debug: Annotated[bool, Parameter(negative="")] = False
    """Show an error's traceback before its line."""
    log_level: Literal["debug", "info", "warning", "error"] | None = None
    """Log to standard error, from this level on."""

    def configure_logging(self) -> None:
        """Configure logging for the program; the library never does."""
        if self.log_level is not None:
            logging.basicConfig(
                level=self.log_level.upper(),
                format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
            )
