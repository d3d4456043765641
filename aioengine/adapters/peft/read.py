"""PEFT LoRA directories: read, validated against the base model, and packed for a slot.

Everything here blocks and is meant for a loader thread; reading and hashing release the GIL.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig, fields_of, parse_config
from aioengine.adapters.peft.folder import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    SAFETENSORS_FILE,
    AdapterFolder,
    OpenFile,
)
from aioengine.adapters.peft.folding.fold import Fold, MethodFold
from aioengine.adapters.peft.folding.parameters import ParameterFold
from aioengine.adapters.peft.pack import PackedAdapter, pack
from aioengine.adapters.peft.part import Part
from aioengine.adapters.peft.shard_reads import Cut, cuts_of, select
from aioengine.adapters.peft.targets import Layout, max_data_bytes, modules_of
from aioengine.adapters.peft.weights_file import Entry, SafetensorsHeader, tensors_of
from aioengine.adapters.read_threads import Progress
from aioengine.errors import AdapterInvalid
from aioengine.model.buffer import Buffer
from aioengine.model.pooling import MAX_POOLING_BYTES, POOLING_FILE, Kind, parse_pooling
from aioengine.model.slots.layout import SlotLayout
from aioengine.step import HeldFiles

logger = logging.getLogger("aioengine")

MAX_WARNINGS = 64
"""Maximum number of warnings about expressions that RE2 does not take."""
HASHED_BYTES = 8 << 20
"""Bytes that are hashed while the next are read."""

Pieces = Sequence[tuple[int, int]]
"""Offsets and lengths in a file's data, in bytes."""


class Contents(NamedTuple):
    """What a weights file holds, and which parts of it a rank reads."""

    layout: Layout
    parts: Mapping[str, Part]
    cuts: Mapping[str, Cut]
    """Which part of each tensor is read."""
    entries: Sequence[Entry]
    """The parts that are read, in memory order."""
    pieces: Pieces
    """Where the parts are in the file, in the same order."""


class KnownContents:
    """The contents of the latest few files. Adapters that were trained alike have the same configuration and
    header, and for a model with many experts it takes long to derive from these what goes where. Used by
    several threads."""

    SIZE = 8

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._known: dict[tuple[bytes, SafetensorsHeader], Contents] = {}
        self._lock = Lock()

    def get(
        self, config: PeftLoraConfig, header: SafetensorsHeader, find: Callable[[], Contents]
    ) -> Contents:
        key = msgspec.json.encode(config), header
        found = self._known.get(key)
        if found is None:
            found = find()
            with self._lock:
                self._known[key] = found
                while len(self._known) > self.SIZE:
                    del self._known[next(iter(self._known))]
        return found

    def is_new(self, text: str) -> bool:
        """Whether a warning is given for the first time. None is new after the first few."""
        with self._lock:
            new = text not in self._warned and len(self._warned) < MAX_WARNINGS
            self._warned |= {text} if new else set()
        return new


def read_adapter(
    name: str,
    path: str | Path,
    slot: SlotLayout,
    *,
    dtype: torch.dtype,
    base_weight: Callable[[str], Tensor],
    known: KnownContents,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    files: HeldFiles | None = None,
) -> PackedAdapter:
    """Read the PEFT directory ``path`` and check that it fits the base model and the slot pool.

    Args:
        slot: The slots' layout. If they hold a rank's share, only the share is read, checked and returned.
        dtype: The dtype that the weights will have, and have to be finite in.
        base_weight: The base model's weight [vocabulary, hidden] of ``embed_tokens`` or ``lm_head``. PEFT
            saves that weight along with an adapter on it; the saved copy is compared with this one and left
            out.
        known: What was derived before for the same ``slot``.
        allow_nonfinite: Accept NaN and infinity in the weights.
        progress: Told of each call on the folder's files.
        files: Read these in place of a folder.

    Raises:
        AdapterLoadError: a file is missing, cannot be read, or changed while it was read.
        AdapterInvalid: malformed, unsupported, or made for another base model.
        AdapterTooLarge: a module's rank exceeds that of the slots.
    """
    folder = AdapterFolder(name, str(path), progress, files)
    folder.check()
    reader = _Reader(folder, slot, dtype, base_weight, known, allow_nonfinite)
    try:
        packed = reader.read()
    except AdapterInvalid:
        folder.check_unchanged()  # a file that was replaced during the read does not show a bad adapter
        raise
    folder.check_unchanged()
    return replace(packed, version=folder.version)


@dataclass(frozen=True, slots=True)
class _Reader:
    folder: AdapterFolder
    slot: SlotLayout
    dtype: torch.dtype
    base_weight: Callable[[str], Tensor]
    known: KnownContents
    allow_nonfinite: bool

    def read(self) -> PackedAdapter:
        folder = self.folder
        text = _all_of(folder, CONFIG_FILE, MAX_CONFIG_BYTES)
        digest = hashlib.sha256(text)
        fields = fields_of(text, folder)
        parameters = ParameterFold.of(fields, folder, self.slot.spec)
        fold: Fold | None = parameters or MethodFold.of(fields, folder)
        config = fold.config if fold else parse_config(fields, folder)
        if config.unmatched and self.known.is_new(config.unmatched):
            logger.warning(
                "adapter %r (%s): %s: %s; the names of the file's tensors say which modules it is on",
                folder.name,
                folder.path,
                CONFIG_FILE,
                config.unmatched,
            )
        with folder.open(SAFETENSORS_FILE) as file, ThreadPoolExecutor(1, "aioengine-load-helper") as helper:
            header = SafetensorsHeader.read(file)
            digest.update(header.raw)

            def data(pieces: Pieces) -> Buffer:
                buffer, end = Buffer(max(1, sum(length for _, length in pieces))), 0
                for offset, length in pieces:
                    file.seek(len(header.raw) + offset)
                    begin, end = end, end + length
                    for start in range(begin, end, HASHED_BYTES):
                        view = buffer.view[start : min(start + HASHED_BYTES, end)]
                        file.read_into(view)
                        if self.slot.shard.size == 1:  # beside the rest; done at the end of the block
                            helper.submit(digest.update, view)
                return buffer

            if fold is None:
                find = partial(self._contents, config, lambda: header.entries(file))
                contents = self.known.get(config, header, find)
                tensors = tensors_of(data(contents.pieces), contents.entries)
            else:
                contents, tensors = self._folded(file, header, fold, data)
            packed = pack(
                folder,
                contents.layout,
                contents.parts,
                contents.cuts,
                tensors,
                dtype=self.dtype,
                base_weight=self.base_weight,
                allow_nonfinite=self.allow_nonfinite,
            )
        pooling = self._pooling(digest, config)
        return replace(
            packed,
            digest="" if self.slot.shard.size > 1 else digest.hexdigest(),
            pooling=pooling,
            invocation=tuple(config.alora_invocation_tokens or ()),
        )

    def _contents(self, config: PeftLoraConfig, entries_of: Callable[[], list[Entry]]) -> Contents:
        slot, entries = self.slot, entries_of()
        shapes = {entry.key: entry.shape for entry in entries}
        config = config.on(modules_of(shapes)) if config.unmatched else config
        layout = Layout(self.folder, config, slot.spec, max_rank=slot.max_rank, target_modules=slot.modules)
        parts = layout.parts(shapes)
        cuts = cuts_of(slot, layout, parts)
        return Contents(layout, parts, cuts, *select(entries, cuts))

    def _folded(
        self,
        file: OpenFile,
        header: SafetensorsHeader,
        fold: Fold,
        data: Callable[[Pieces], Buffer],
    ) -> tuple[Contents, dict[str, Tensor]]:
        """Read the whole file, and return what it is folded to, or the rank's part of that."""
        slot, entries = self.slot, header.entries(file)
        folded = fold.plan({entry.key: entry.shape for entry in entries}, slot)
        if header.data_bytes > max_data_bytes(slot.spec, slot.max_rank, slot.modules):
            file.invalid(f"has {header.data_bytes} bytes of data, more than an adapter that fits can have")
        tensors = folded.tensors(tensors_of(data([(0, header.data_bytes)]), entries))
        made = [Entry(key, of.dtype, tuple(of.shape), 0, of.nbytes) for key, of in tensors.items()]
        contents = self._contents(folded.config, lambda: made)
        return contents, {key: contents.cuts[key].of(tensor) for key, tensor in tensors.items()}

    def _pooling(self, digest: hashlib._Hash, config: PeftLoraConfig) -> Kind | None:
        """Read sentence-transformers' configuration, if there is one that counts."""
        if not self.folder.has(POOLING_FILE):
            return None
        data = _all_of(self.folder, POOLING_FILE, MAX_POOLING_BYTES)
        digest.update(data)
        try:
            return parse_pooling(data) if config.feature_extraction else None
        except ValueError as error:
            self.folder.invalid(f"{POOLING_FILE}: {error}")


def _all_of(folder: AdapterFolder, name: str, most: int) -> bytes:
    with folder.open(name) as file:
        if file.size > most:
            file.invalid(f"has {file.size} bytes, more than {most}")
        return bytes(file.read(file.size))
