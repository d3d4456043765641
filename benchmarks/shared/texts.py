"""Text to measure with."""

from __future__ import annotations

from pathlib import Path


def paragraphs() -> list[str]:
    """Return the paragraphs of this repository's documentation, each as one line."""
    files = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    texts = [text for file in files for text in file.read_text(encoding="utf-8").split("\n\n")]
    return [" ".join(text.split()) for text in texts if text[:1].isalpha()]
