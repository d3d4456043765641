"""Adapters that are given in memory: tensors, or the content of files. No folder is written.

They are written as ``save_pretrained`` would write them, but to anonymous memory (``memfd_create``). Every
rank that needs this memory reads and checks it like a folder, and again after the adapter has left the CPU
cache or the workers were lost. The caller may change the tensors as soon as the adapter is loaded.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec

from aioengine.adapters.peft.folder import CONFIG_FILE, MAX_CONFIG_BYTES, failed, invalid, naming
from aioengine.adapters.resolvers.sources import check_name
from aioengine.errors import AdapterInvalid, AdapterLoadError, EngineStopped
from aioengine.step import HeldFiles

if TYPE_CHECKING:
    from torch import Tensor

MAX_HELD = 256
"""Maximum number of such adapters in an engine; each keeps a file descriptor open."""


class HeldAdapter:
    """The memory of an adapter's files, which goes with the last reference to this. ``path`` is its name in
    errors and in ``AdapterInfo``; it is not a path of any file system."""

    def __init__(self, path: str, config: bytes, descriptor: int, nbytes: int) -> None:
        self.path = path
        self.nbytes = nbytes
        self.files = HeldFiles(config, f"/proc/{os.getpid()}/fd/{descriptor}")
        self._close = weakref.finalize(self, os.close, descriptor)

    @property
    def alive(self) -> bool:
        return self._close.alive

    def release(self) -> None:
        """Free the memory at once, whoever refers to it; may be called again."""
        self._close()


class HeldAdapters:
    """An engine's adapters that are given in memory. They are copied one at a time, in the thread of
    ``work``; all copies together may take ``most`` bytes."""

    def __init__(self, work: ThreadPoolExecutor, most: int) -> None:
        self._work = work
        self._most = most
        self._numbers = count(1)
        self._living: weakref.WeakSet[HeldAdapter] = weakref.WeakSet()
        self._closed = False

    async def copy(self, name: str, hold: Callable[..., HeldAdapter]) -> HeldAdapter:
        """Copy an adapter with ``hold(name, path, room=...)``. If the caller is cancelled, the copy still
        ends, and is freed then."""
        path = f"memory:{next(self._numbers)}"
        check_name(name, path)
        return await asyncio.get_running_loop().run_in_executor(self._work, self._copy, name, path, hold)

    def _copy(self, name: str, path: str, hold: Callable[..., HeldAdapter]) -> HeldAdapter:
        if self._closed:
            raise EngineStopped("the engine was stopped before the adapter was copied")
        living = [held.nbytes for held in self._living if held.alive]
        if len(living) >= MAX_HELD:
            why = f"there are {len(living)} adapters that were given in memory, which is the maximum"
            todo = "unload some, or load this one from a folder"
            raise AdapterLoadError(f"{why}: {todo}", name=name, path=path)
        held = hold(name, path, room=self._most - sum(living))
        self._living.add(held)
        return held

    def close(self) -> None:
        """Wait for the copy under way, and free all, because the engine has stopped."""
        self._closed = True
        self._work.shutdown(wait=True)
        for held in self._living:
            held.release()


def hold_tensors(
    name: str, path: str, tensors: Mapping[str, Tensor], config: object, *, room: int
) -> HeldAdapter:
    """Copy ``tensors``, named as PEFT names them in a file, and the configuration. Blocking.

    Args:
        path: Name of the adapter's place in errors.
        config: A ``peft.LoraConfig``, or a mapping of its fields.
        room: Bytes that the tensors may take.

    Raises:
        AdapterInvalid: the tensors or the configuration have another form.
        AdapterLoadError: there is no room for them.
    """
    from aioengine.adapters.peft.weights_file import file_of  # imports torch

    with naming(name, path):
        text = _config_text(config)
        return _held(path, text, *file_of(tensors), room)


def state_of(model: object, adapter_name: str | None, name: str) -> tuple[dict[str, Tensor], object]:
    """Return the tensors and the configuration of a ``peft.PeftModel``'s adapter; None is the active one.
    ``name``: that of the adapter in the engine, for errors. Raises AdapterInvalid for another object."""
    peft: Any = sys.modules.get("peft")  # a caller with such a model has imported peft
    if peft is None or not isinstance(model, peft.PeftModel):
        raise AdapterInvalid(f"model={type(model).__name__}: expected a peft.PeftModel", name=str(name))
    live: Any = model
    active = live.active_adapter if adapter_name is None else adapter_name
    if active not in live.peft_config:
        raise AdapterInvalid(
            f"adapter_name={active!r}: the model has {', '.join(live.peft_config)}", name=str(name)
        )
    # Embeddings of the base model are not part of the adapter, and PEFT might ask the Hub for them.
    state = peft.get_peft_model_state_dict(live, adapter_name=active, save_embedding_layers=False)
    return state, live.peft_config[active]


def hold_files(name: str, path: str, config: bytes, weights: memoryview, *, room: int) -> HeldAdapter:
    """Copy the content of ``adapter_config.json`` and ``adapter_model.safetensors``. Blocking. Raises as
    :func:`hold_tensors`."""
    with naming(name, path):
        _check_length(CONFIG_FILE, config)
        return _held(path, config, len(weights), (weights,), room)


def _held(path: str, config: bytes, nbytes: int, parts: Iterable[memoryview], room: int) -> HeldAdapter:
    """Write ``parts`` to an anonymous file, which cannot be changed afterwards."""
    if nbytes > room:
        failed(
            f"it takes {nbytes:,} bytes, and LoRAConfig.max_held_lora_bytes has room for {max(room, 0):,} "
            "more; unload adapters that were given in memory, raise the bound, or load this one from a folder"
        )
    if not hasattr(os, "memfd_create"):
        failed("adapters in memory need Linux: save the adapter with save_pretrained and load the folder")
    try:
        descriptor = os.memfd_create("aioengine-adapter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        held = HeldAdapter(path, config, descriptor, nbytes)
        with open(descriptor, "wb", closefd=False) as file:
            file.writelines(parts)
    except OSError as error:
        failed(f"there is no memory, or no file descriptor, to hold it: {error.strerror}")
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return held


def _config_text(config: object) -> bytes:
    """Return the configuration as PEFT writes it: sets as sorted lists, enumerations as their values."""
    to_dict = getattr(config, "to_dict", None)
    fields = to_dict() if callable(to_dict) else config
    if not isinstance(fields, Mapping):
        invalid(f"config={type(config).__name__}: expected a peft.LoraConfig, or a dict of its fields")
    try:
        text = msgspec.json.encode(fields, order="deterministic")
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        invalid(f"config: cannot be written as JSON: {error}")
    _check_length("config", text)
    return text


def _check_length(what: str, config: bytes) -> None:
    if len(config) > MAX_CONFIG_BYTES:
        invalid(f"{what}: has {len(config)} bytes, more than {MAX_CONFIG_BYTES}")
