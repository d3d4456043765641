"""PrefixKeeper: writes pinned prefixes to files, and brings them back for requests that begin with them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aioengine import events
from aioengine.adapters.read_threads import ReadThreads
from aioengine.core.prefixes.held import Held
from aioengine.core.state import AdapterEntry, Request
from aioengine.executors.base import Device
from aioengine.request import RequestOptions, SamplingParams
from aioengine.runtime.loop import Stepper
from aioengine.runtime.prefixes.files import ModelFiles, PrefixFiles
from aioengine.runtime.tasks import end_tasks

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("aioengine")

AT_ONCE = 16
"""Blocks that are copied between two steps, so that a copy delays no step by much."""
MAX_WRITES = 8
"""Prefixes that wait to be written; more are not written this time."""
MAX_READS = 2
"""Prefixes that are in memory at a time on their way from files to blocks."""
PATIENCE = 5.0
"""Seconds that a request waits for its prefix. Then it is computed, as are those of all requests that come
before that read has ended: the folder may be one that hangs."""
CLOSING = 5.0
"""Seconds that the engine's stop waits for the file that is being read or written."""


class PrefixKeeper:
    """Keeps the prefixes of ``CachePin(save=True)`` in files.

    A prefix is written after the request that computed it has its first token, and read before a request is
    accepted whose prefix the cache does not have. A prefix that cannot be read or written is computed as
    usual: no request fails.
    """

    def __init__(
        self,
        stepper: Stepper,
        device: Device,
        files: PrefixFiles,
        model: ModelFiles,
        settings: str,
    ) -> None:
        self._stepper = stepper
        self._core = stepper.core
        self._device = device
        self._files = files
        self._model = model
        self._settings = settings
        """Settings that keys and values depend on."""
        self._digest: str | None = None
        """Digest of the model's files."""
        self._restarts = 0
        self._checked = 0
        """The value of ``_restarts`` when the model's files were compared with those that it was loaded from
        at first."""
        self._threads = ReadThreads("aioengine-prefix")
        self._expected: dict[str, Request] = {}
        """Requests that compute prefixes to write."""
        self._reads: dict[bytes, asyncio.Task[bool]] = {}
        """Reads under way, by the hash of the prefix's last block."""
        self._writes: dict[bytes, asyncio.Task[bool]] = {}
        self._late: asyncio.Task[bool] | None = None
        """The last read that took longer than a request waits."""
        self._may_digest, self._may_read = asyncio.Lock(), asyncio.Semaphore(MAX_READS)
        self._may_write = asyncio.Lock()
        self._said: set[type[Exception]] = set()
        """Kinds of errors that have been reported: each once, since every request may meet it."""
        self._closed = False

    # Requests

    async def bring(
        self, tokens: list[int], params: SamplingParams, adapter: AdapterEntry | None, options: RequestOptions
    ) -> None:
        """Read the longest prefix of a request that is in a file and not in the prefix cache. Takes no longer
        than PATIENCE, and goes on for others that wait for the same prefix if this call is cancelled."""
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
        until = self._now() + PATIENCE
        for hashes in reversed(self._prefixes(request)):
            if self._closed or self._is_cached(hashes) or (self._late and not self._late.done()):
                return
            if self._stepper.recovering:
                return  # there are no blocks to read it into
            key = hashes[-1]
            if key not in self._reads:
                self._task(self._read, hashes, self._reads)
            read = self._reads[key]
            await asyncio.wait([read], timeout=until - self._now())
            if not read.done():
                self._late = read
                self._warn(TimeoutError(f"a read takes longer than {PATIENCE} s"))
                return
            if read.cancelled() or read.result():
                return

    def expect(self, request: Request) -> None:
        """Write the prefixes of a request once they are computed."""
        if any(pin.save for pin in request.options.cache_pins):
            self._expected[request.id] = request

    def handle(self, event: events.Event) -> None:
        """Take in an event of the engine."""
        if isinstance(event, events.EngineRestarted):
            self._restarts += 1
        if isinstance(event, (events.FirstToken, events.RequestEnded)):
            request = self._expected.pop(event.request_id, None)
            for hashes in () if request is None else self._prefixes(request):
                key = hashes[-1]
                if key in self._writes or len(self._writes) >= MAX_WRITES or self._closed:
                    continue
                if self._is_cached(hashes):
                    self._task(self._write, hashes, self._writes)

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

    async def _read(self, hashes: Sequence[bytes]) -> bool:
        began, restarts = self._now(), self._restarts
        about = await self._about(hashes[-1])
        async with self._may_read:
            if not self._core.held.has_room(hashes, spare=len(self._core.running)):
                return False
            tensors = await self._threads.run(lambda: self._files.read(_name(about), about))
            if tensors is None or restarts != self._restarts:
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
        async with self._may_write:
            restarts = self._restarts
            about = await self._about(hashes[-1])
            has = await self._threads.run(lambda: self._files.has(_name(about)))
            if has or restarts != self._restarts:
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
            if not await self._threads.run(lambda: self._files.write(_name(about), _joined(parts), about)):
                return False
        self._report("saved", hashes, began)
        return True

    def _release(self, held: Held) -> None:
        self._core.held.release(held)
        self._stepper.wake()

    async def _about(self, key: bytes) -> dict[str, str]:
        """Return the description that the file of a prefix must have. The hash stands for the tokens, the
        adapter's content and the salt.

        Raises OSError if the model's files have changed since it was loaded first: processes that were
        started again have loaded what is there now."""
        async with self._may_digest:
            restarts = self._restarts
            if self._digest is None:
                self._digest = await self._threads.run(self._model.digest)
            elif self._checked != restarts:
                await self._threads.run(self._model.check)
            self._checked = restarts
        layout = f"{self._settings}; {self._device.kv_layout}"
        return {"format": "aioengine-kv-1", "model": self._digest, "layout": layout, "prefix": key.hex()}

    def _task(
        self,
        work: Callable[[Sequence[bytes]], Coroutine[Any, Any, bool]],
        hashes: Sequence[bytes],
        tasks: dict[bytes, asyncio.Task[bool]],
    ) -> None:
        async def guarded() -> bool:
            try:
                return await work(hashes)
            except Exception as error:
                self._warn(error)
                return False

        key = hashes[-1]
        tasks[key] = asyncio.get_running_loop().create_task(guarded(), name="aioengine-prefix")
        tasks[key].add_done_callback(lambda _: tasks.pop(key))

    def _warn(self, error: Exception) -> None:
        if type(error) not in self._said:
            what = str(error) if isinstance(error, OSError) else repr(error)
            logger.warning("kv_cache_dir: %s; such prefixes are computed again", what)
        self._said.add(type(error))

    def _report(self, action: events.PrefixAction, hashes: Sequence[bytes], began: float) -> None:
        tokens = len(hashes) * self._core.blocks.block_size
        now = self._now()
        self._stepper.report(events.PrefixMoved(time=now, action=action, tokens=tokens, seconds=now - began))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def close(self) -> None:
        """End what is under way; requests that wait for it go on. Waits until a file that is being written is
        complete, unless that takes too long."""
        self._closed = True
        await end_tasks([*self._reads.values(), *self._writes.values()])
        await self._threads.wait(CLOSING)


def _name(about: dict[str, str]) -> str:
    return hashlib.sha256("\n".join(about.values()).encode()).hexdigest()


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    import torch

    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
