"""Makes links to files of the repository that are no pages into links to the repository, for mkdocs."""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[1]))
        if path.startswith("docs/") and path.endswith((".md", ".png", ".svg")):
            return found[0]
        return f"]({config.repo_url}/blob/main/{path}{found[2] or ''})"

    return _LINK.sub(link, markdown)
