"""PEFT LoRA directories: read, validated against the base model, and packed for a slot.

Everything here blocks and is meant for a loader thread; reading and hashing release the GIL.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig, fields_of, parse_config
from aioengine.adapters.peft.folder import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    SAFETENSORS_FILE,
    AdapterFolder,
    invalid,
    invalid_weights,
    naming,
)
from aioengine.adapters.peft.folding.fold import Fields, Folded, Shapes, fold_method
from aioengine.adapters.peft.folding.methods import METHODS
from aioengine.adapters.peft.folding.parameters import TARGETS, fold_parameters
from aioengine.adapters.peft.pack import PackedAdapter, pack
from aioengine.adapters.peft.targets import Layout, modules_of
from aioengine.adapters.peft.weights_file import Entry, SafetensorsHeader, tensors_of
from aioengine.adapters.read_threads import Progress
from aioengine.errors import AdapterInvalid
from aioengine.model.buffer import Buffer
from aioengine.model.pooling import MAX_POOLING_BYTES, POOLING_FILE, Kind, parse_pooling
from aioengine.model.slots.layout import SlotLayout
from aioengine.step import HeldFiles

logger = logging.getLogger("aioengine")

MAX_KNOWN = 8
HASHED_BYTES = 2 << 20
"""Bytes that are hashed while the next are read."""
MAX_ITEM_BYTES = 4


class Plan(NamedTuple):
    """What follows from an adapter's configuration and its file's header."""

    entries: Sequence[Entry]
    """The tensors, in the order of the file."""
    layout: Layout | None
    folded: Folded | None = None
    """What the adapter is folded to; its layout follows from that."""


class _Digest:
    """SHA-256 of what is read, if it is ``wanted``, computed in a thread beside the work on it. What is
    hashed must not change."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted, self._sha = wanted, hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, "aioengine-load-helper")

    def update(self, data: bytes | memoryview) -> None:
        if self._wanted:
            self._thread.submit(self._sha.update, data)

    def result(self) -> Callable[[], str]:
        """Return a function that waits for the digest, in hexadecimal."""
        return self._thread.submit(self._sha.hexdigest).result if self._wanted else str

    def close(self) -> None:
        """Let the thread end when it has hashed what it was given."""
        self._thread.shutdown(wait=False)


KnownPlans = dict[tuple[bytes, SafetensorsHeader], Plan]
"""The latest few plans, by configuration and header. Adapters that were trained alike have the same, and for
a model with many experts it takes long to derive from these what goes where. Several threads may share it."""


@dataclass(frozen=True)
class AdapterReader:
    """Reads PEFT directories, checks that they fit the base model and the slot pool, and packs them.

    Args:
        slot: The slots' layout. If they hold a rank's share, only the share is read.
        dtype: The dtype that the weights will have.
        base_weight: The base model's weight [vocabulary, hidden] of ``embed_tokens`` or ``lm_head``. PEFT
            saves that weight along with an adapter on it; the saved copy is compared with this one and left
            out.
    """

    slot: SlotLayout
    dtype: torch.dtype
    base_weight: Callable[[str], Tensor]
    known: KnownPlans = field(default_factory=dict)

    def read(
        self, name: str, path: str, progress: Progress | None = None, files: HeldFiles | None = None
    ) -> PackedAdapter:
        """Read the directory ``path``, or ``files`` in its place. ``progress`` is told of each call on files.

        Raises:
            AdapterLoadError: a file is missing, cannot be read, or changed while it was read.
            AdapterInvalid: malformed, unsupported, or made for another base model.
            AdapterTooLarge: a module's rank exceeds that of the slots.
        """
        with naming(name, path):
            folder = AdapterFolder(path, progress, files)
            folder.check()
            try:
                plan, data, pooling, find_digest = self._read(folder, f"{name!r} ({path})")
                layout, tensors = self._unfolded(plan, tensors_of(data, plan.entries))
                packed = pack(layout, tensors, self.slot, dtype=self.dtype, base_weight=self.base_weight)
                kind = _pooling_kind(pooling) if layout.config.feature_extraction else None
            except AdapterInvalid:
                folder.check_unchanged()  # a file that was replaced during the read shows no bad adapter
                raise
            folder.check_unchanged()
        return replace(packed, find_digest=find_digest, pooling=kind, version=folder.version)

    def _read(self, folder: AdapterFolder, adapter: str) -> tuple[Plan, Buffer, bytes, Callable[[], str]]:
        """Read the files: what to do with the tensors' data, the data, pooling's configuration if there is
        one, and a function that waits for the digest, which only the first of several ranks computes."""
        digest = _Digest(wanted=self.slot.shard.rank == 0)
        try:
            text = folder.content(CONFIG_FILE, MAX_CONFIG_BYTES)
            digest.update(text)
            if not folder.has(SAFETENSORS_FILE):  # what is wrong with the configuration is said first
                self._check_plain(text)
            with folder.open(SAFETENSORS_FILE) as file:
                header = SafetensorsHeader.read(file)
                digest.update(header.raw)
                plan = self.known.get((text, header)) or self._plan(text, header, adapter)
                self.known[text, header] = plan
                for old in list(self.known)[:-MAX_KNOWN]:
                    self.known.pop(old, None)
                data = Buffer(max(1, header.data_bytes))
                for begin in range(0, header.data_bytes, HASHED_BYTES):
                    view = data.view[begin : min(begin + HASHED_BYTES, header.data_bytes)]
                    file.read_into(view)
                    digest.update(view)
            pooling = folder.content(POOLING_FILE, MAX_POOLING_BYTES) if folder.has(POOLING_FILE) else b""
            digest.update(pooling)
            return plan, data, pooling, digest.result()
        finally:
            digest.close()

    def _check_plain(self, text: bytes) -> None:
        """Raise AdapterInvalid for a configuration that no file could go with."""
        fields = fields_of(text)
        if self._folding(fields) is None:
            parse_config(fields)

    def _folding(self, fields: Fields) -> Callable[[Fields, Shapes, SlotLayout], Folded] | None:
        """Return what folds an adapter with these fields; None: it is a pair of A and B as it is."""
        if fields.get(TARGETS) and next(self.slot.spec.bare_parameters(), None) is not None:
            return fold_parameters
        return fold_method if fields.get("peft_type") in tuple(METHODS) else None

    def _plan(self, text: bytes, header: SafetensorsHeader, adapter: str) -> Plan:
        fields, entries, slot = fields_of(text), header.entries(), self.slot
        shapes = {entry.key: entry.shape for entry in entries}
        if (fold := self._folding(fields)) is not None:
            folded = fold(fields, shapes, slot)
            if header.data_bytes > MAX_ITEM_BYTES * slot.elements * slot.shard.size:
                invalid_weights(
                    f"has {header.data_bytes} bytes of data, more than an adapter that fits can have"
                )
            return Plan(entries, None, folded)
        config = parse_config(fields)
        if config.unmatched:
            logger.warning(
                "adapter %s: %s: %s; the names of the file's tensors say which modules it is on",
                adapter,
                CONFIG_FILE,
                config.unmatched,
            )
        return Plan(entries, self._layout(config, shapes))

    def _unfolded(self, plan: Plan, tensors: Mapping[str, Tensor]) -> tuple[Layout, Mapping[str, Tensor]]:
        """Return the layout of a plan, and its tensors; of an adapter that is folded, what is made of its."""
        if plan.layout is not None:
            return plan.layout, tensors
        assert plan.folded is not None
        made = plan.folded.tensors(tensors)
        shapes = {key: tuple(tensor.shape) for key, tensor in made.items()}
        return self._layout(plan.folded.config, shapes), made

    def _layout(self, config: PeftLoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        named = config.on(modules_of(shapes)) if config.unmatched else config
        return Layout(named, self.slot, shapes)


def _pooling_kind(text: bytes) -> Kind | None:
    try:
        return parse_pooling(text) if text else None
    except ValueError as error:
        invalid(f"{POOLING_FILE}: {error}")
