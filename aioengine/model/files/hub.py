"""Folders from the Hugging Face Hub, for models and for adapters (extra ``hub``)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PREFIX = "hf:"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.+")
_HUB_ID = re.compile(r"(?:hf:)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def is_source(path: str) -> bool:
    """Whether ``path`` names something that is fetched into a local folder first: "hf:...", or a URL."""
    return path.startswith(PREFIX) or _URL.fullmatch(path) is not None


class HubId(NamedTuple):
    """A repository ("owner/name") and, if one was given, its branch, tag or commit."""

    repo: str
    revision: str | None


def parse_hub_id(text: str) -> HubId | None:
    """Parse "owner/name" or "owner/name@revision", with or without "hf:" before it; None for anything
    else."""
    match = _HUB_ID.fullmatch(text)
    return None if match is None else HubId(match[1], match[2])


def has_hub() -> bool:
    """Whether ``huggingface_hub`` is installed."""
    return importlib.util.find_spec("huggingface_hub") is not None


def download(hub_id: HubId, patterns: Sequence[str], *, local_files_only: bool = False) -> Path:
    """Download the repository's files that match ``patterns``, and return their folder in the local cache.

    Cached files are not fetched again; if the Hub cannot be reached, cached files are used. Blocking.
    Raises ImportError, or one of the many types that ``huggingface_hub`` raises.
    """
    from huggingface_hub import snapshot_download  # optional

    found = snapshot_download(
        hub_id.repo,
        revision=hub_id.revision,
        allow_patterns=list(patterns),
        local_files_only=local_files_only,
    )
    return Path(found)


def explain(error: Exception) -> str:
    """Explain why :func:`download` raised ``error``, in a few words, and what to do about it."""
    from huggingface_hub import constants, errors  # optional

    if isinstance(error, errors.GatedRepoError):
        return "the Hub's repository of this name is gated: ask for access there, and set HF_TOKEN"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
        return "the Hub has no such repository or revision (a private one needs HF_TOKEN)"
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the Hub's local cache, and HF_HUB_OFFLINE forbids downloads: unset it"
        return "it is not in the Hub's local cache, and the Hub cannot be reached: check the network"
    return f"it cannot be downloaded from the Hub: {type(error).__name__}: {error}"
