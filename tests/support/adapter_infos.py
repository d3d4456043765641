"""Descriptions of adapters, for tests that care about a few of their fields."""

from __future__ import annotations

from typing import Any

from aioengine.info import AdapterInfo


def adapter_info(name: str, **fields: Any) -> AdapterInfo:
    """Return version 1 of an adapter of rank 8 in the CPU cache, but with these fields."""
    usual = {
        "version": 1,
        "path": name,
        "rank": 8,
        "bytes": 1,
        "location": "cpu",
    }
    return AdapterInfo(name=name, **{**usual, **fields})  # type: ignore[arg-type]
