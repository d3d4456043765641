"""Descriptions of an engine and its state: :class:`EngineInfo`, :class:`AdapterInfo`, and others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from hashlib import sha256
from typing import Literal

import msgspec

LoadProgress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: reports how many bytes of a model are loaded. It is called often, in the
loading thread."""

EngineState = Literal["new", "starting", "running", "draining", "stopping", "stopped", "dead"]

AdapterLocation = Literal["disk", "loading", "cpu", "slot"]
SlotStateName = Literal["FREE", "LOADING", "READY", "DRAINING"]


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The present state of a registered adapter."""

    name: str
    version: int = 0
    """0 until its source has been fetched."""
    path: str
    rank: int = 0
    """0, as ``bytes`` and ``labels``, until it has been read once."""
    bytes: int = 0
    """Size in the CPU cache."""
    digest: str = ""
    """SHA-256 of its files, hexadecimal; "" until it has been read once."""
    labels: int = 0
    """Labels of its trained classification head."""
    location: AdapterLocation = "disk"
    """The fastest place that holds it."""
    slot: int | None = None
    pinned: bool = False
    running: int = 0
    waiting: int = 0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Description of the engine; it does not change while the engine lives."""

    version: str
    kernels: str
    """Name of the kernels: "cpu-avx512_bf16", "triton", "torch", ..."""
    python: str
    torch: str
    model_impl: str
    quantization: str
    batch_invariant: bool


class SlotInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    index: int
    state: SlotStateName
    adapter: str | None
    version: int | None
    running: int
    pinned: bool
    replica: str | None = None
    """Replica of a fleet, whose slots ``index`` counts."""
    offset: int | None = None
    """Of its adapter in the memory that slots share, as ``bytes``."""
    bytes: int = 0


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """The present state of the engine; counters count from its start."""

    slots: tuple[SlotInfo, ...]
    cpu_adapters: int
    """Adapters in the CPU cache."""
    cpu_capacity: int
    adapters: int
    """Registered adapters."""
    running: int
    """Requests in the batch."""
    waiting: int
    waiting_for_adapter: int
    """Of ``waiting``: have not run yet, and their adapter is in no slot."""
    waiting_preempted: int = 0
    """Of ``waiting``: have run before."""
    max_waiting: int | None = None
    waiting_tokens: int = 0
    """Prompt tokens of the requests that have not run yet."""
    max_waiting_tokens: int | None = None
    max_running: int = 0
    kv_blocks: int
    kv_blocks_free: int
    block_size: int
    uncomputed_tokens: int = 0
    """Prompt tokens that are still to be computed, of all requests."""
    waiting_for: dict[str, int] = {}
    """Waiting requests by adapter; "" is the base model."""
    steps: int
    preemptions: int
    requests_finished: int = 0
    requests_aborted: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache supplied."""
    output_tokens: int = 0
    slot_loads: int = 0
    """Adapters copied into slots."""
    slot_evictions: int = 0
    cpu_loads: int = 0
    """Adapters read from disk."""
    cpu_evictions: int = 0
    load_failures: int = 0
    listener_failures: int = 0
    """Exceptions that event listeners have raised."""
    slot_memory: int = 0
    """Bytes of the slots' memory, on each device."""
    slot_memory_used: int = 0
    """Bytes that adapters take."""
    slot_memory_fragmented: int = 0
    """Free bytes outside of the largest hole."""
    slot_hits: int = 0
    """Requests whose adapter was in a slot when they arrived."""
    slot_misses: int = 0


def mix_name(parts: Iterable[tuple[str, float]]) -> str:
    """Return a mix's name, such as "pirate*0.3+sql*0.7"; versions, as in "sql@2", stay in it."""
    return "+".join(f"{name}*{weight!r}" for name, weight in parts)


def scaled_digest(digest: str, scale: float) -> str:
    """Return the digest of what an adapter adds if it is multiplied by a number."""
    return sha256(f"{digest}*{scale!r};".encode()).hexdigest()


def is_mix(name: str) -> bool:
    """Whether this is a mix's name: no adapter has an asterisk in its own."""
    return "*" in name


def without_versions(name: str) -> str:
    """Return the name of an adapter or of a mix without the versions in it."""
    return re.sub(r"@[^*]*", "", name)
