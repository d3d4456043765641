"""Asking the policy, and not trusting the answer.

Here only its form is checked; whether each item is allowed is for the core to say when it applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from aioengine.schedulers.policy import Decision, Place, SchedulerPolicy, SchedulerView


def ask(
    policy: SchedulerPolicy,
    safe: SchedulerPolicy,
    view: SchedulerView,
    failed: Callable[[str], None],
) -> Decision:
    """The policy's decision; if it raises or returns something else, ``failed`` is told why and the
    safe policy decides instead."""
    try:
        return _well_formed(policy.schedule(view))
    except Exception as error:
        failed(f"{type(policy).__name__}: {type(error).__name__}: {error}")
        return safe.schedule(view)


def _well_formed(answer: Any) -> Decision:
    if not isinstance(answer, Decision):
        raise TypeError(f"schedule() returned {type(answer).__name__}, not Decision")
    return Decision(
        admit=_strings("admit", answer.admit),
        place=[_place(item) for item in _items("place", answer.place)],
        prefetch=_strings("prefetch", answer.prefetch),
        preempt=_strings("preempt", answer.preempt),
    )


def _place(item: Any) -> Place:
    adapter, slot = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
    if not isinstance(adapter, str) or not (slot is None or type(slot) is int):
        raise TypeError(f"place contains {item!r}, not Place(adapter: str, slot: int | None)")
    return Place(adapter, slot)


def _strings(field: str, items: Any) -> list[str]:
    found = list(_items(field, items))
    for item in found:
        if not isinstance(item, str):
            raise TypeError(f"{field} contains {item!r}, not a str")
    return found


def _items(field: str, items: Any) -> Iterable[Any]:
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(f"{field} is {items!r}, not a sequence")
    return items
