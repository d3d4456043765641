"""A folder to begin a study with: a policy, a workload, a comparison and a notebook, which run as they
are."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from aioengine.errors import ConfigError

TEMPLATES = files("aioengine.lab.runs") / "study"
"""The files. Programs among them have ".txt" after their names, because nothing here runs them."""


def new_study(folder: str | Path) -> list[Path]:
    """Write a study into a folder that is not there yet, or empty; returns its files.

    Raises ConfigError if the folder has files, or cannot be written.
    """
    folder = Path(folder)
    written = []
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: has files already; name a new one, or an empty one")
        folder.mkdir(parents=True, exist_ok=True)
        for template in sorted(TEMPLATES.iterdir(), key=lambda each: each.name):
            path = folder / template.name.removesuffix(".txt")
            text = template.read_text(encoding="utf-8").replace("{name}", folder.resolve().name)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return written
