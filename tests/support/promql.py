"""Which metrics and labels a PromQL expression asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client.metrics_core import Metric

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
"""What Prometheus appends to a family's name, by type."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_RANGE = re.compile(r"\[[^\]]*\]")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)?\s*\{([^}]*)\}")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_NAME = re.compile(r"(?<![\w:.$])[a-zA-Z_:][\w:]*(?!\s*\()(?![\w:])")
_WORDS = frozenset({"and", "or", "unless", "bool", "offset", "inf", "nan"})


class Asked(NamedTuple):
    metrics: frozenset[str]
    labels: frozenset[str]
    """Those in matchers and groupings."""


def asked(expr: str) -> Asked:
    """What is left of an expression without its strings, ranges, functions and operators."""
    labels: set[str] = set()
    bare = _RANGE.sub("", _STRING.sub('""', expr))
    for grouping in _GROUPING.findall(bare):
        labels.update(filter(None, re.split(r"[\s,]+", grouping)))
    for _name, matchers in _SELECTOR.findall(bare):
        labels.update(_MATCHER.findall(matchers))
    bare = re.sub(r"\{[^}]*\}", "", _STRING.sub("", _GROUPING.sub("", bare)))
    names = {name for name in _NAME.findall(bare) if name.lower() not in _WORDS}
    return Asked(frozenset(names), frozenset(labels))


def series_names(families: Iterable[Metric]) -> Iterator[str]:
    """The names of all series that the families have, or will have once something happens."""
    for family in families:
        for suffix in SUFFIXES[family.type]:
            yield family.name + suffix
