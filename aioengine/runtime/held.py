"""Copies of adapters that are given in memory."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from aioengine.adapters.peft.held import MAX_HELD, HeldAdapter
from aioengine.adapters.resolvers.sources import check_name
from aioengine.errors import AdapterInvalid, AdapterLoadError, EngineStopped

if TYPE_CHECKING:
    from torch import Tensor


class HeldAdapters:
    """Copies adapters that are given in memory, one at a time in the thread of ``work``. All copies together
    may take ``most`` bytes."""

    def __init__(self, work: ThreadPoolExecutor, most: int) -> None:
        self._work = work
        self._most = most
        self._numbers = count(1)
        self._living: WeakSet[HeldAdapter] = WeakSet()
        self._copying = asyncio.Lock()
        self._closed = False

    async def copy(self, name: str, hold: Callable[..., HeldAdapter]) -> HeldAdapter:
        """Copy an adapter with ``hold(name, path, room=...)``."""
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
        return held

    def close(self) -> None:
        """Free all copies, because the engine has stopped."""
        self._closed = True
        for held in self._living:
            held.release()


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
