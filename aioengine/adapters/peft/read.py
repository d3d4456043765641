"""PEFT LoRA directories: read, validated against the base model, and packed for a slot.

Everything here blocks and is meant for a loader thread; reading and hashing release the GIL.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from aioengine.adapters.peft import folder as folders
from aioengine.adapters.peft.config import PeftLoraConfig, fields_of, parse_config
from aioengine.adapters.peft.contents import Contents, KnownContents, SlotOrder
from aioengine.adapters.peft.folding.fold import Fold
from aioengine.adapters.peft.folding.parameters import ParameterFold
from aioengine.adapters.peft.held import folder_of
from aioengine.adapters.peft.pack import PackedAdapter, Packer
from aioengine.adapters.peft.targets import Layout, max_data_bytes, modules_of
from aioengine.adapters.peft.weights_file import SafetensorsHeader, Weights, tensors_of
from aioengine.adapters.read_threads import Progress
from aioengine.errors import AdapterInvalid
from aioengine.model.buffer import Buffer
from aioengine.model.pooling import MAX_POOLING_BYTES, POOLING_FILE, Kind, parse_pooling
from aioengine.step import HeldFiles

logger = logging.getLogger("aioengine")


def read_adapter(
    name: str,
    path: str | Path,
    order: SlotOrder,
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
        order: The slot whose order the tensors are laid out in, so that its image needs no further copy. If
            it holds a rank's share, only the share is read, checked and returned.
        dtype: The dtype of the returned tensors; the scaling is folded into B in float32 and rounded once.
        base_weight: The base model's weight [vocabulary, hidden] of ``embed_tokens`` or ``lm_head``. PEFT
            saves that weight along with an adapter on it; the saved copy is compared with this one and left
            out.
        known: Headers that were parsed before for the same ``order`` and ``dtype``, and need not be parsed
            again.
        allow_nonfinite: Accept NaN and infinity in the weights.
        progress: Told of each call on the folder's files.
        files: Read these in place of a folder.

    Raises:
        AdapterLoadError: a file is missing, cannot be read, or changed while it was read.
        AdapterInvalid: malformed, unsupported, or made for another base model.
        AdapterTooLarge: a module's rank exceeds ``max_rank``.
    """
    folder = folder_of(name, str(path), files, progress)
    folder.check()
    reader = _Reader(folder, order, dtype, base_weight, known, allow_nonfinite)
    try:
        packed = reader.read()
    except AdapterInvalid:
        folder.check_unchanged()  # a file that was replaced during the read does not show a bad adapter
        raise
    folder.check_unchanged()
    return replace(packed, version=folder.version)


@dataclass(frozen=True, slots=True)
class _Reader:
    folder: folders.AdapterFolder
    order: SlotOrder
    dtype: torch.dtype
    base_weight: Callable[[str], Tensor]
    known: KnownContents
    allow_nonfinite: bool

    def read(self) -> PackedAdapter:
        text = self._config()
        slot = self.order.layout
        where = {"name": self.folder.name, "path": self.folder.path}
        fields = fields_of(text, **where)
        fold = ParameterFold.of(fields, self.folder, slot.spec) or Fold.of(fields, self.folder)
        config = fold.config if fold else parse_config(fields, **where)
        if config.unmatched and self.known.is_new(config.unmatched):
            logger.warning(
                "adapter %r (%s): %s: %s; the names of the file's tensors say which modules it is on",
                self.folder.name,
                self.folder.path,
                folders.CONFIG_FILE,
                config.unmatched,
            )
        digest = hashlib.sha256(text)
        with self.folder.open(folders.SAFETENSORS_FILE) as file:
            header = SafetensorsHeader.read(self.folder, file)
            digest.update(header.raw)
            if fold is not None:
                packed = self._folded(file, header, fold, digest)
            elif slot.shard.size > 1:
                packed = self._share(file, header, config)
            else:
                packed = self._whole(file, header, config, digest)
        pooling = self._pooling(digest, config)
        return replace(
            packed,
            digest="" if slot.shard.size > 1 else digest.hexdigest(),
            pooling=pooling,
            invocation=config.invocation,
        )

    def _config(self) -> bytes:
        with self.folder.open(folders.CONFIG_FILE) as file:
            if file.size > folders.MAX_CONFIG_BYTES:
                self.folder.invalid(
                    f"{folders.CONFIG_FILE}: has {file.size} bytes, more than {folders.MAX_CONFIG_BYTES}"
                )
            return bytes(file.read(file.size))

    def _pooling(self, digest: hashlib._Hash, config: PeftLoraConfig) -> Kind | None:
        """Read sentence-transformers' configuration, if there is one that counts."""
        if not self.folder.has(POOLING_FILE):
            return None
        with self.folder.open(POOLING_FILE) as file:
            if file.size > MAX_POOLING_BYTES:
                self.folder.invalid(f"{POOLING_FILE} has more than {MAX_POOLING_BYTES} bytes")
            data = file.read(file.size)
        digest.update(data)
        try:
            return parse_pooling(bytes(data)) if config.feature_extraction else None
        except ValueError as error:
            self.folder.invalid(f"{POOLING_FILE}: {error}")

    def _whole(
        self, file: folders.OpenFile, header: SafetensorsHeader, config: PeftLoraConfig, digest: hashlib._Hash
    ) -> PackedAdapter:
        # Normally the header is checked while the data is hashed. It is checked first if the file is empty,
        # or too large for LoRA weights that fit: then it is nearly always refused, without taking memory.
        slot = self.order.layout
        max_rank = min(slot.max_rank, config.max_rank)
        if not 0 < header.data_bytes <= max_data_bytes(slot.spec, max_rank, slot.modules):
            self._contents(file, header, config)
        buffer = Buffer(header.data_bytes)
        with ThreadPoolExecutor(1, thread_name_prefix="aioengine-load-helper") as helper:
            hashing = _read_and_hash(file, buffer.view, digest, helper)
            contents = self._contents(file, header, config)
            packed = self._pack(file, contents, tensors_of(buffer, contents.entries))
            hashing.result()
            return packed

    def _share(
        self, file: folders.OpenFile, header: SafetensorsHeader, config: PeftLoraConfig
    ) -> PackedAdapter:
        """Read the tensors' parts into memory one after another."""
        contents = self._contents(file, header, config)
        buffer = Buffer(sum(length for _, length in contents.pieces))
        end = 0
        for offset, length in contents.pieces:
            file.seek(len(header.raw) + offset)
            file.read_into(buffer.view[end : end + length])
            end += length
        return self._pack(file, contents, tensors_of(buffer, contents.entries))

    def _folded(
        self,
        file: folders.OpenFile,
        header: SafetensorsHeader,
        fold: Fold | ParameterFold,
        digest: hashlib._Hash,
    ) -> PackedAdapter:
        entries = header.entries(self.folder, file)
        slot = self.order.layout
        folded = fold.plan(file.name, {entry.key: entry.shape for entry in entries}, slot)
        if header.data_bytes > max_data_bytes(slot.spec, slot.max_rank, slot.modules):
            self.folder.invalid(
                f"{file.name}: has {header.data_bytes} bytes of data, more than an adapter that fits can have"
            )
        buffer = Buffer(header.data_bytes)
        file.read_into(buffer.view)
        digest.update(buffer.view)
        tensors = folded.tensors(tensors_of(buffer, entries).tensors)
        layout = self._layout(folded.config, tensors)
        parts = layout.parts(file.name, {key: tensor.shape for key, tensor in tensors.items()})
        return self._pack(file, *Contents.of_tensors(slot, self.dtype, layout, parts, tensors))

    def _layout(self, config: PeftLoraConfig, keys: Iterable[str]) -> Layout:
        slot = self.order.layout
        config = config.on(modules_of(keys)) if config.unmatched else config
        return Layout(self.folder, config, slot.spec, max_rank=slot.max_rank, target_modules=slot.modules)

    def _contents(
        self, file: folders.OpenFile, header: SafetensorsHeader, config: PeftLoraConfig
    ) -> Contents:
        key = (config, header.raw, header.data_bytes)
        contents = self.known.get(key)
        if contents is None:
            entries = header.entries(self.folder, file)
            shapes = {entry.key: entry.shape for entry in entries}
            layout = self._layout(config, shapes)
            parts = layout.parts(file.name, shapes)
            contents = Contents.of_file(self.order.layout, self.dtype, layout, parts, entries)
            self.known.put(key, contents)
        return contents

    def _pack(self, file: folders.OpenFile, contents: Contents, weights: Weights) -> PackedAdapter:
        packer = Packer(
            self.folder,
            file.name,
            contents,
            weights,
            order=self.order,
            dtype=self.dtype,
            base_weight=self.base_weight,
            allow_nonfinite=self.allow_nonfinite,
        )
        return packer.pack()


def _read_and_hash(
    file: folders.OpenFile, view: memoryview, digest: hashlib._Hash, helper: Executor
) -> Future[None]:
    """Fill ``view`` from ``file`` while ``helper``, a pool of one thread, hashes what has arrived.

    Two small pieces are hashed while the large last one is read. The last one is hashed in one call, which
    has begun when this function returns. The helper needs the GIL to begin a piece: it gets the GIL easily
    while this thread reads, but only late while this thread runs Python.
    """
    begun = Event()

    def update(piece: memoryview) -> None:
        begun.set()
        digest.update(piece)

    ends = (len(view) // 8, len(view) // 4, len(view))
    for begin, end in pairwise((0, *ends)):
        file.read_into(view[begin:end])
        begun.clear()
        hashing = helper.submit(update, view[begin:end])
    begun.wait()
    return hashing
