"""PrefixKeeper: writes pinned prefixes to files, and brings them back for requests that begin with them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aioengine import events
from aioengine.core.prefixes.held import Held
from aioengine.core.state import AdapterEntry, Request
from aioengine.executors.base import Device
from aioengine.request import RequestOptions, SamplingParams
from aioengine.runtime.loop import Stepper
from aioengine.runtime.prefixes.files import PrefixFiles, model_digest
from aioengine.runtime.tasks import end_tasks

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

logger = logging.getLogger("aioengine")

AT_ONCE = 16
"""Blocks that are copied between two steps, so that a copy delays no step by much."""
MAX_WRITES = 8
"""Prefixes that wait to be written; more are not written this time."""


class PrefixKeeper:
    """Keeps the prefixes of ``CachePin(save=True)`` in files.

    A prefix is written after the request that computed it has its first token, and read before a request is
    accepted whose prefix the cache does not have. Files are read and written in ``work``. A prefix that
    cannot be read or written is computed as usual: no request fails.
    """

    def __init__(
        self,
        stepper: Stepper,
        device: Device,
        files: PrefixFiles,
        model: Path,
        settings: str,
        work: ThreadPoolExecutor,
    ) -> None:
        self._stepper = stepper
        self._core = stepper.core
        self._device = device
        self._files = files
        self._model = model
        self._settings = settings
        """Settings that keys and values depend on."""
        self._digest: str | None = None
        self._work = work
        self._expected: dict[str, Request] = {}
        """Requests that compute prefixes to write."""
        self._reads: dict[bytes, asyncio.Task[bool]] = {}
        """Reads under way, by the hash of the prefix's last block."""
        self._writes: dict[bytes, asyncio.Task[bool]] = {}
        self._one_by_one = asyncio.Lock()
        self._failed = False

    # Requests

    async def bring(
        self, tokens: list[int], params: SamplingParams, adapter: AdapterEntry | None, options: RequestOptions
    ) -> None:
        """Read the longest prefix of a request that is in a file and not in the prefix cache."""
        request = Request(
            "",
            tokens,
            params,
            adapter=adapter,
            seq=-1,
            arrival=0.0,
            seed=0,
            deadline=None,
            options=options,
            cache=self._core.blocks,
        )
        for hashes in reversed(self._prefixes(request)):
            if self._is_cached(hashes) or await self._read_once(hashes):
                return

    def expect(self, request: Request) -> None:
        """Write the prefixes of a request once they are computed."""
        if any(pin.save for pin in request.options.cache_pins):
            self._expected[request.id] = request

    def handle(self, event: events.Event) -> None:
        """Take in an event of the engine."""
        if isinstance(event, (events.FirstToken, events.RequestEnded)):
            request = self._expected.pop(event.request_id, None)
            for hashes in () if request is None else self._prefixes(request):
                key = hashes[-1]
                if key not in self._writes and len(self._writes) < MAX_WRITES and self._is_cached(hashes):
                    self._writes[key] = self._task(self._write(hashes), self._writes, key)

    def _prefixes(self, request: Request) -> list[Sequence[bytes]]:
        """Return the hashes of the prefixes that the request wants in files, the shortest first. They depend
        on its adapter's content, so there are none before it has been read."""
        if request.adapter is not None and not request.adapter.digest:
            return []
        size, most = self._core.blocks.block_size, request.prompt_len
        counts = {min(pin.tokens, most) // size for pin in request.options.cache_pins if pin.save}
        hashes = request.hash_blocks(self._core.blocks)
        return [hashes[:count] for count in sorted(counts) if count]

    def _is_cached(self, hashes: Sequence[bytes]) -> bool:
        blocks = self._core.blocks
        return len(blocks.match(hashes, len(hashes) * blocks.block_size)) == len(hashes)

    # Files

    async def _read_once(self, hashes: Sequence[bytes]) -> bool:
        """Read a prefix, unless that is done already; others may be waiting for it, so it goes on if this
        request is cancelled."""
        key = hashes[-1]
        if key not in self._reads:
            self._reads[key] = self._task(self._read(hashes), self._reads, key)
        return await asyncio.shield(self._reads[key])

    async def _read(self, hashes: Sequence[bytes]) -> bool:
        began = self._now()
        about = await self._about(hashes[-1])
        tensors = await self._in_thread(lambda: self._files.read(_name(about), about))
        if tensors is None:
            return False
        held = self._core.held.take(hashes, spare=len(self._core.running))
        if held is None:
            return False
        try:
            for begin in range(held.known, len(hashes), AT_ONCE):
                end = min(begin + AT_ONCE, len(hashes))
                part = {name: tensor[begin:end] for name, tensor in tensors.items()}
                await self._device.write_kv(held.blocks[begin:end], part)
            self._core.held.written(held)
        finally:
            self._release(held)
        self._report("loaded", hashes, began)
        return True

    async def _write(self, hashes: Sequence[bytes]) -> bool:
        began = self._now()
        async with self._one_by_one:
            about = await self._about(hashes[-1])
            if await self._in_thread(lambda: self._files.has(_name(about))):
                return False
            held = self._core.held.hold(hashes)
            if held is None:
                return False
            parts: list[Mapping[str, Tensor]] = []
            try:
                for begin in range(0, len(hashes), AT_ONCE):
                    parts.append(await self._device.read_kv(held.blocks[begin : begin + AT_ONCE]))
            finally:
                self._release(held)
            if not await self._in_thread(lambda: self._files.write(_name(about), _joined(parts), about)):
                return False
        self._report("saved", hashes, began)
        return True

    def _release(self, held: Held) -> None:
        self._core.held.release(held)
        self._stepper.wake()

    async def _about(self, key: bytes) -> dict[str, str]:
        """Return what the file of a prefix is of. The hash stands for the tokens, the adapter's content and
        the salt."""
        if self._digest is None:
            self._digest = await self._in_thread(lambda: model_digest(self._model))
        layout = f"{self._settings}; {self._device.kv_layout}"
        return {"format": "aioengine-kv-1", "model": self._digest, "layout": layout, "prefix": key.hex()}

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._work, work)

    def _task(
        self, work: Coroutine[Any, Any, bool], tasks: dict[bytes, asyncio.Task[bool]], key: bytes
    ) -> asyncio.Task[bool]:
        async def guarded() -> bool:
            try:
                return await work
            except OSError as error:
                if not self._failed:  # said once: it may be the case for every request
                    logger.warning("kv_cache_dir: %s; prefixes are computed where that fails", error)
                self._failed = True
                return False
            finally:
                del tasks[key]

        return asyncio.get_running_loop().create_task(guarded(), name="aioengine-prefix")

    def _report(self, action: events.PrefixAction, hashes: Sequence[bytes], began: float) -> None:
        tokens = len(hashes) * self._core.blocks.block_size
        now = self._now()
        self._stepper.report(events.PrefixMoved(time=now, action=action, tokens=tokens, seconds=now - began))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def written(self) -> None:
        """Wait until all prefixes that are computed are in files."""
        while self._writes:
            await asyncio.wait([*self._writes.values()])

    async def close(self) -> None:
        await end_tasks([*self._reads.values(), *self._writes.values()])
        await self._in_thread(lambda: None)  # a file that is being written is complete then


def _name(about: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(about.values()).encode()).hexdigest()


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
