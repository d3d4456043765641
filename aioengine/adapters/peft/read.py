"""PEFT LoRA directories: read, validated against the base model, and packed for a slot.

Everything here blocks and is meant for a loader thread; reading and hashing release the GIL.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from aioengine.adapters.peft import folder as folders
from aioengine.adapters.peft.config import PeftLoraConfig, parse_config
from aioengine.adapters.peft.fast_pack import Contents, KnownContents, cuts_of
from aioengine.adapters.peft.folding.fold import Fold
from aioengine.adapters.peft.folding.parameters import ParameterFold
from aioengine.adapters.peft.held import folder_of
from aioengine.adapters.peft.pack import Packed, Packer, SlotOrder, contiguous
from aioengine.adapters.peft.shard_reads import Cut
from aioengine.adapters.peft.targets import Layout, Part, max_data_bytes, modules_of
from aioengine.adapters.peft.weights_file import SafetensorsHeader, Weights, tensors_of
from aioengine.adapters.read_threads import Progress
from aioengine.errors import AdapterInvalid
from aioengine.model.buffer import Buffer
from aioengine.model.pooling import MAX_POOLING_BYTES, POOLING_FILE, Head, Kind, parse_pooling
from aioengine.model.slots.image import ImageShape
from aioengine.model.slots.tokens import TrainedTokens
from aioengine.step import HeldFiles

logger = logging.getLogger("aioengine")


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """A LoRA adapter in CPU memory, ready to be copied into a slot; or a rank's share of one."""

    name: str
    path: str
    rank: int
    """The largest effective rank of its modules."""
    digest: str
    """SHA-256 (hex) over the configuration and the weights file: the identity of the content. "" for a rank's
    share, which is not the whole content; see :func:`aioengine.adapters.peft.digest.content_digest`."""
    nbytes: int
    """Bytes of its memory."""
    tensors: Mapping[tuple[int, str], tuple[Tensor, Tensor]]
    """(layer, module) -> (A [r, in], B [out, r]); B holds the scaling, so that delta = B @ A.

    Layer -1 has ``embed_tokens`` (in: vocabulary, out: hidden) and ``lm_head`` (in: hidden, out: vocabulary).
    """
    magnitudes: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """DoRA (arXiv:2402.09353): (layer, module) -> the norm that each output's weights get [out], float32."""
    biases: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """``lora_bias``: (layer, module) -> bias [out] of B, times the scaling."""
    in_order: Tensor | None = None
    """The memory of ``tensors``, if they were asked for in the order of a slot; see
    :func:`aioengine.model.slots.image.build_image`."""
    shape: ImageShape | None = None
    """The shape of that image, where it is known."""
    computed: Mapping[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A and B as the norms of DoRA need them, for the modules of which ``tensors`` has only a rank's
    share."""
    head: Head | None = None
    """A trained classification head."""
    tokens: TrainedTokens | None = None
    """Rows of the embeddings and of the model's head that it replaces."""
    pooling: Kind | None = None
    """Pooling that sentence-transformers' configuration names, if there is one."""
    invocation: tuple[int, ...] = ()
    """If it is an activated LoRA adapter, it applies from these tokens on; none: to all tokens."""
    version: str = ""
    """Version of the files' content, known without reading it; see :class:`AdapterFolder`."""

    @property
    def summable(self) -> bool:
        """Whether it is A and B, and nothing else, so that a step can add it up with others."""
        more = self.head is not None or self.tokens is not None
        return not (self.magnitudes or self.biases or more or self.invocation)


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
        packed, digest, pooling, invocation = reader.read()
    except AdapterInvalid:
        folder.check_unchanged()  # a file that was replaced during the read does not show a bad adapter
        raise
    folder.check_unchanged()
    return PackedAdapter(
        name=name,
        path=folder.path,
        rank=packed.rank,
        digest=digest,
        nbytes=packed.nbytes,
        tensors=packed.tensors,
        magnitudes=packed.magnitudes,
        biases=packed.biases,
        in_order=packed.in_order,
        shape=packed.shape,
        computed=packed.computed,
        head=packed.head,
        tokens=packed.tokens,
        pooling=pooling,
        invocation=invocation,
        version=folder.version,
    )


def _read_config(folder: folders.AdapterFolder) -> bytes:
    with folder.open(folders.CONFIG_FILE) as file:
        if file.size > folders.MAX_CONFIG_BYTES:
            folder.invalid(
                f"{folders.CONFIG_FILE}: has {file.size} bytes, more than {folders.MAX_CONFIG_BYTES}"
            )
        return bytes(file.read(file.size))


@dataclass(frozen=True, slots=True)
class _Reader:
    folder: folders.AdapterFolder
    order: SlotOrder
    dtype: torch.dtype
    base_weight: Callable[[str], Tensor]
    known: KnownContents
    allow_nonfinite: bool

    def read(self) -> tuple[Packed, str, Kind | None, tuple[int, ...]]:
        config_bytes = _read_config(self.folder)
        fold = ParameterFold.of(config_bytes, self.folder, self.order.layout.spec) or Fold.of(
            config_bytes, self.folder
        )
        config = (
            fold.config if fold else parse_config(config_bytes, name=self.folder.name, path=self.folder.path)
        )
        if config.unmatched and self.known.is_new(config.unmatched):
            logger.warning(
                "adapter %r (%s): %s: %s; the names of the file's tensors say which modules it is on",
                self.folder.name,
                self.folder.path,
                folders.CONFIG_FILE,
                config.unmatched,
            )
        digest = hashlib.sha256(config_bytes)
        with self.folder.open(folders.SAFETENSORS_FILE) as file:
            if fold is not None:
                packed = self._folded(file, fold, digest)
            else:
                packed = self._safetensors(file, config, digest)
        pooling = self._pooling() if config.feature_extraction else None
        return packed, "" if self._shared else digest.hexdigest(), pooling, config.invocation

    def _pooling(self) -> Kind | None:
        """Read sentence-transformers' configuration, if there is one."""
        if not self.folder.has(POOLING_FILE):
            return None
        with self.folder.open(POOLING_FILE) as file:
            data = file.read(min(file.size, MAX_POOLING_BYTES))
        try:
            return parse_pooling(bytes(data))
        except ValueError as error:
            self.folder.invalid(f"{POOLING_FILE}: {error}")

    @property
    def _shared(self) -> bool:
        """Whether a rank's share is wanted."""
        return self.order.layout.shard.size > 1

    def _safetensors(self, file: folders.OpenFile, config: PeftLoraConfig, digest: hashlib._Hash) -> Packed:
        header = SafetensorsHeader.read(self.folder, file)
        digest.update(header.raw)
        # Normally the header is checked while the data is hashed. It is checked first if the file is empty,
        # or too large for LoRA weights that fit: then it is nearly always refused, without taking memory.
        contents: Contents | None = None
        slot = self.order.layout
        max_rank = min(slot.max_rank, config.max_rank)
        if not 0 < header.data_bytes <= max_data_bytes(slot.spec, max_rank, slot.modules):
            contents = self._contents(file, config, header)
        if self._shared:
            return self._share(file, header, contents or self._contents(file, config, header))
        buffer = Buffer(header.data_bytes)
        with ThreadPoolExecutor(1, thread_name_prefix="aioengine-load-helper") as helper:
            hashing = _read_and_hash(file, buffer.view, digest, helper)
            contents = contents or self._contents(file, config, header)
            packed = self._shortcut(contents, buffer)
            if packed is not None:
                hashing.result()
                return packed
            weights = tensors_of(buffer, contents.entries)
            packed = self._packer(file, contents.layout, contents.parts, weights, {}).pack()
            hashing.result()
            return packed

    def _share(self, file: folders.OpenFile, header: SafetensorsHeader, contents: Contents) -> Packed:
        """Read the tensors' parts into memory one after another."""
        buffer = Buffer(sum(length for _, length in contents.pieces))
        end = 0
        for offset, length in contents.pieces:
            file.seek(len(header.raw) + offset)
            file.read_into(buffer.view[end : end + length])
            end += length
        packed = self._shortcut(contents, buffer)
        if packed is None:
            weights = tensors_of(buffer, contents.entries)
            packed = self._packer(file, contents.layout, contents.parts, weights, contents.cuts).pack()
        return packed

    def _shortcut(self, contents: Contents, buffer: Buffer) -> Packed | None:
        if contents.shortcut is None:
            return None
        return contents.shortcut.pack(
            buffer.tensor, allow_nonfinite=self.allow_nonfinite, allocate=self.order.allocate
        )

    def _folded(self, file: folders.OpenFile, fold: Fold | ParameterFold, digest: hashlib._Hash) -> Packed:
        header = SafetensorsHeader.read(self.folder, file)
        entries = header.entries(self.folder, file)
        slot = self.order.layout
        folded = fold.plan(file.name, {entry.key: entry.shape for entry in entries}, slot)
        if header.data_bytes > max_data_bytes(slot.spec, slot.max_rank, slot.modules):
            self.folder.invalid(
                f"{file.name}: has {header.data_bytes} bytes of data, more than an adapter that fits can have"
            )
        buffer = Buffer(header.data_bytes)
        file.read_into(buffer.view)
        digest.update(header.raw)
        digest.update(buffer.view)
        tensors = folded.tensors(tensors_of(buffer, entries).tensors)
        layout = self._layout(folded.config, tensors)
        parts = layout.parts(file.name, {key: tensor.shape for key, tensor in tensors.items()})
        return self._pack_whole(file, layout, parts, Weights(tensors, list(tensors.values())))

    def _pack_whole(
        self, file: folders.OpenFile, layout: Layout, parts: Mapping[str, Part], weights: Weights
    ) -> Packed:
        """Pack tensors that are in memory as a whole, even if only a rank's share is wanted."""
        cuts: Mapping[str, Cut] = {}
        if self._shared:
            cuts = cuts_of(self.order.layout, parts, layout)
            tensors = {key: contiguous(cuts[key].of(tensor)) for key, tensor in weights.tensors.items()}
            weights = Weights(tensors, list(tensors.values()))
        return self._packer(file, layout, parts, weights, cuts).pack()

    def _layout(self, config: PeftLoraConfig, keys: Iterable[str]) -> Layout:
        slot = self.order.layout
        if config.unmatched:
            config = config.on(modules_of(keys))
        return Layout(self.folder, config, slot.spec, max_rank=slot.max_rank, target_modules=slot.modules)

    def _contents(
        self, file: folders.OpenFile, config: PeftLoraConfig, header: SafetensorsHeader
    ) -> Contents:
        key = (config, header.raw, header.data_bytes)
        contents = self.known.get(key)
        if contents is None:
            entries = header.entries(self.folder, file)
            shapes = {entry.key: entry.shape for entry in entries}
            layout = self._layout(config, shapes)
            parts = layout.parts(file.name, shapes)
            contents = Contents.of(self.order, self.dtype, entries, parts, layout)
            self.known.put(key, contents)
        return contents

    def _packer(
        self, file: folders.OpenFile, layout: Layout, parts: Mapping[str, Part], weights: Weights,
        cuts: Mapping[str, Cut],
    ) -> Packer:  # fmt: skip
        packer = Packer(
            self.folder,
            file.name,
            layout,
            parts,
            weights,
            dtype=self.dtype,
            allow_nonfinite=self.allow_nonfinite,
            order=self.order,
            cuts=cuts,
        )
        packer.check(self.base_weight)
        return packer


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
