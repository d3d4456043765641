"""Loading adapters that are given in memory."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakSet

from aioengine.adapters.peft.held import MAX_HELD, HeldAdapter, hold_files, hold_tensors
from aioengine.adapters.resolvers.sources import check_name
from aioengine.errors import AdapterInvalid, AdapterLoadError, EngineStopped
from aioengine.info import AdapterInfo
from aioengine.runtime.adapters import AdapterOps, LoadFlags

if TYPE_CHECKING:
    from torch import Tensor


class HeldAdapters:
    """Copies adapters that are given in memory, one at a time in the thread of ``work``, and loads them. All
    copies together may take ``most`` bytes."""

    def __init__(self, adapters: AdapterOps, work: ThreadPoolExecutor, most: int) -> None:
        self._adapters = adapters
        self._work = work
        self._most = most
        self._numbers = count(1)
        self._living: WeakSet[HeldAdapter] = WeakSet()
        self._copying = asyncio.Lock()
        self._closed = False

    async def load_tensors(
        self, name: str, tensors: Mapping[str, Tensor], config: object, **flags: Unpack[LoadFlags]
    ) -> AdapterInfo:
        return await self._load(name, partial(hold_tensors, tensors=tensors, config=config), **flags)

    async def load_state(
        self, name: str, model: object, adapter_name: str | None, **flags: Unpack[LoadFlags]
    ) -> AdapterInfo:
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
        return await self.load_tensors(name, state, live.peft_config[active], **flags)

    async def load_files(
        self, name: str, config: bytes, weights: memoryview, **flags: Unpack[LoadFlags]
    ) -> AdapterInfo:
        return await self._load(name, partial(hold_files, config=config, weights=weights), **flags)

    async def _load(
        self, name: str, hold: Callable[..., HeldAdapter], **flags: Unpack[LoadFlags]
    ) -> AdapterInfo:
        """Copy an adapter with ``hold(name, path, room=...)``, and load the copy."""
        path = f"memory:{next(self._numbers)}"
        check_name(name, path)
        async with self._copying:
            if self._closed:
                raise EngineStopped("the engine was stopped before the adapter was copied")
            living = [held.nbytes for held in self._living if held.alive]
            if len(living) >= MAX_HELD:
                raise AdapterLoadError(
                    f"there are {len(living)} adapters that were given in memory, which is the maximum: "
                    "unload some, or load this one from a folder",
                    name=name,
                    path=path,
                )
            # If the caller is cancelled, the copy still ends, and is freed then.
            work = partial(hold, name, path, room=self._most - sum(living))
            held = await asyncio.get_running_loop().run_in_executor(self._work, work)
            self._living.add(held)
        try:
            return await self._adapters.load(name, path, held=held, **flags)
        except BaseException:
            if not self._adapters.holds(held):
                held.release()  # at once, and not when the last reference to the error goes
            raise

    def close(self) -> None:
        """Free all copies, because the engine has stopped."""
        self._closed = True
        for held in self._living:
            held.release()
