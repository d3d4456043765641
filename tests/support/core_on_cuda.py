"""The core, the runner, and copies into slots as an engine puts them together, on a :class:`FakeCuda`.

The threads of an engine are "main" (the event loop), "step", "copy" and "load". Here one thread plays them
all, in an order that a random generator chooses; copies also run in the middle of steps.
"""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from support.fake_cuda import Clock, FakeCuda
from support.random_slots import random_image
from support.step_tokens import tokens_of
from torch import Tensor

from aioengine.core import CopyMove
from aioengine.core.limits import CoreLimits
from aioengine.core.state import AdapterEntry
from aioengine.model.buffer import Allocate, page_locked
from aioengine.model.build import build_runner
from aioengine.model.decode_graphs import DecodeLimits, DecodeSteps
from aioengine.model.files.hf_config import read_spec
from aioengine.model.model import StepInputs
from aioengine.model.slots.image import AdapterImage
from aioengine.model.slots.layout import SlotLayout
from aioengine.schedulers import Decision, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.step import StepBatch, StepResult
from aioengine.testing import LIMITS, Sim

NAMES = ("a", "b", "c", "d")
RANKS = (8, 3, 5, 8)
SLOTS = {"fixed": 2, "shared by adapters": 3}
"""Ways in which slots lie in memory, with the number of slots."""


class Queued(NamedTuple):
    """A step that the device thread has been given."""

    batch: StepBatch
    told: Clock


class Drawn(NamedTuple):
    """A token, and what it follows."""

    context: tuple[int, ...]
    adapter: AdapterEntry | None
    token: int


class Preempting(FCFS):
    """FCFS that takes a running request off the batch now and then."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(max_wait=0.05)
        self._rng = rng

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        running = sorted(request.request_id for request in view.running)
        if not running or self._rng.random() > 0.4:
            return decision
        return decision._replace(preempt=[self._rng.choice(running)])


class CudaSim(Sim):
    """A core whose steps and copies a runner carries out."""

    def __init__(self, world: FakeCuda, model: Path, slots: str, rng: random.Random, *, played: bool) -> None:
        self.world, self.rng = world, rng
        spec = read_spec(model)
        blocks = LIMITS.num_blocks
        self.runner = build_runner(
            *(spec, model), dtype=torch.float32, device=torch.device("cuda", world.index), num_blocks=blocks,
            block_size=LIMITS.block_size, max_loras=SLOTS[slots], max_lora_rank=8, kernels="torch",
            slot_memory=60_000 if slots == "shared by adapters" else None,
        )  # fmt: skip
        assert self.runner.lora_slots is not None
        self.slots = self.runner.lora_slots
        self.allocate = page_locked(self.runner.model.device)
        limits: CoreLimits = LIMITS._replace(
            num_slots=SLOTS[slots], num_blocks=blocks, cpu_capacity=SLOTS[slots] + 1,
            slot_memory=60_000 // 256 * 256 if slots == "shared by adapters" else None,
            slot_bytes=self.slots.nbytes // SLOTS[slots],
        )  # fmt: skip
        super().__init__(limits, Preempting(rng))
        self.memory = None  # the runner has the memory
        self.images: dict[int, AdapterImage] = {}
        self.queued: deque[Queued] = deque()
        self.done: deque[tuple[StepBatch, StepResult, Clock]] = deque()
        self.told: dict[int, tuple[CopyMove, Clock]] = {}
        """Copies that were ordered, by uid, and what the copying thread knows of."""
        self.copied: list[tuple[AdapterEntry, Clock]] = []
        self.held: dict[int, AdapterEntry] = {}
        """What was written last into each slot."""
        self.drawn: list[Drawn] = []
        for name, memory in (("KV cache", self.runner.kv_cache.k), ("KV cache", self.runner.kv_cache.v)):
            for tensor in memory:
                world.watch(name, tensor, tensor[0].nbytes)
        world.watch("slots", self.slots.memory.memory, 4)
        world.watch("slots' table", self.slots.memory.device_table, 8)
        if played:
            self._play()
        for name in NAMES:
            self.register(name)
        self.most = rng.choice([1, 2, 8])
        """Requests at once. With few of them, many steps are of parts of prompts only."""

    # The device's threads

    def _play(self) -> None:
        """Give decode steps fixed addresses, as recorded ones have."""
        runner, limits = self.runner, DecodeLimits(LIMITS.max_num_seqs, LIMITS.max_model_len)
        own = runner.model
        model: Any = SimpleNamespace(
            forward=self._compute, slots=own.slots, cache=own.cache, spec=own.spec, dtype=own.dtype,
            device=own.device,
        )  # fmt: skip
        steps = DecodeSteps(model, runner.spec.vocab_size, limits, lambda step: step)
        for step in steps.recorded:
            self.world.watch("a recorded step's inputs", step.token_ids)
            self.world.watch("a recorded step's inputs on the host", step._host.token_ids)
        self.world.watch("logits", steps._logits)
        runner.decode_steps = steps

    def _compute(self, inputs: StepInputs) -> Tensor:
        """Read and write what a decode step's kernels do; its tokens have no meaning."""
        plan, runner = inputs.attention, self.runner
        size, vocab = len(inputs.token_ids), runner.spec.vocab_size
        with self.world.unnoticed():
            tables, positions = plan.tables.tolist(), plan.positions.tolist()
            cells = [cell for cell in plan.cells.tolist() if cell >= 0]
            width = [at // plan.block_size + 1 for at in positions]
            blocks = [b for i in range(len(cells)) for b in tables[i][: width[i]]]
            tiles = [] if not inputs.lora.segments else _tiles(inputs)
        noise = (inputs.token_ids + plan.positions + plan.cells).float()[:, None] + plan.tables.sum()
        for pools in self.slots.layers:
            for pool in pools.values():
                for slot in tiles:
                    noise = noise + self.slots.memory.device_table[slot].sum()
                    for j in range(len(pool.modules)):
                        noise = noise + pool.a(slot, j).sum() + pool.b(slot, j).sum()
        device = noise.device
        if cells:
            where = torch.tensor(blocks, device=device)
            own = torch.tensor([cell // plan.block_size for cell in cells], device=device)
            for memory in (*runner.kv_cache.k, *runner.kv_cache.v):
                memory[own] = 0.5
                noise = noise + memory[where].sum()
        logits = torch.zeros(size, vocab, device=device)
        logits[:, 7] = 1
        return logits + noise * 0

    def compute(self) -> None:
        """Run the step that has waited longest, in its thread."""
        batch, told = self.queued.popleft()
        with self.world.in_thread("step", told):
            held = dict(self.held)
            self.world.between = self._in_between
            result = self.runner.execute(batch)
            self.world.between = None
            self.done.append((batch, result, self.world.now()))
        for work, tokens in zip(batch.sequences, tokens_of(result), strict=True):
            for token in tokens:
                context = (*work.history[: work.start], *work.tokens)
                self.drawn.append(Drawn(context, held.get(work.slot), token))

    def _in_between(self) -> None:
        if self.told and self.rng.random() < 0.02:
            self.copy(self.rng.choice(list(self.told)))

    def copy(self, uid: int) -> None:
        """Write an adapter into its slot, in the copying thread."""
        move, told = self.told.pop(uid)
        with self.world.in_thread("copy", told):
            self.slots.write(move.slot, self.images[uid], move.offset)
            self.held[move.slot] = move.entry
            self.copied.append((move.entry, self.world.now()))

    def close(self) -> None:
        """Free the device's memory."""
        self.images.clear()
        self.world.between = None
        del self.slots, self.runner
        gc.collect()

    # What the event loop does

    def _take_moves(self, before: int) -> None:
        """Order the copies that the last decision started."""
        for move in self.copies[before:]:
            self.told[move.entry.uid] = move, self.world.now()
        self.images = {uid: image for uid, image in self.images.items() if uid in self.on_cpu}

    def form(self) -> None:
        before = len(self.copies)
        if (batch := self.schedule()) is not None:
            self.queued.append(Queued(batch, self.world.now()))
        self._take_moves(before)

    def take_in(self) -> None:
        """Give the core the result of the oldest step."""
        batch, result, told = self.done.popleft()
        self.world.hear(told)
        self.batch = None
        self.core.step_finished(batch, result, self.now)
        self.take_events()

    def read(self, index: int) -> None:
        """Read an adapter from disk."""
        entry = self.loads[index]
        with self.world.in_thread("load", self.world.now()):
            image = image_of(entry, self.slots.layout, self.allocate)
            told = self.world.now()
        self.world.hear(told)
        self.images[entry.uid] = image
        self.sizes[entry.label] = image.data.nbytes
        self.finish_load(index)

    def hear_of_copies(self) -> None:
        while self.copied:
            entry, told = self.copied.pop()
            self.world.hear(told)
            self.finish_copy([move.entry for move in self.copies].index(entry))

    def anything(self) -> None:
        """Do one of the things that can be done now."""
        rng, core = self.rng, self.core
        can: list[Callable[[], object]] = [self._add] * 3
        if self.batch is None:
            can += [self.form] * 8
        if self.queued:
            can += [self.compute] * 8
        if self.done:
            can += [self.take_in] * 8
        if self.loads:
            can += [lambda: self.read(rng.randrange(len(self.loads)))] * 2
        if self.told:
            can.append(lambda: self.copy(rng.choice(list(self.told))))
        if self.copied:
            can += [self.hear_of_copies] * 2
        if core.requests:
            can.append(self._abort)
        can.append(lambda: self.register(rng.choice(NAMES)) if rng.random() < 0.3 else None)
        rng.choice(can)()
        self.now += 0.01

    def _add(self) -> None:
        rng = self.rng
        if len(self.core.requests) < self.most:
            prompt = [rng.randrange(3, 90) for _ in range(rng.choice([1, 3, 9, 20, 40]))]
            self.add(rng.choice([None, *NAMES]), prompt=prompt, max_tokens=rng.choice([1, 4, 12]))

    def _abort(self) -> None:
        request = self.rng.choice(list(self.core.requests.values()))
        self.core.end(request, "abort", self.now)
        self.take_events()


def image_of(entry: AdapterEntry, layout: SlotLayout, allocate: Allocate) -> AdapterImage:
    """Return what the adapter's files have."""
    number = NAMES.index(entry.label.split("@")[0])
    generator = torch.Generator().manual_seed(entry.uid)
    return random_image(
        layout, RANKS[number], generator, torch.float32, affine=number == 1, allocate=allocate
    )


def run(model: Path, slots: str, seed: int, *, played: bool, actions: int = 120) -> CudaSim:
    """Take random actions, until two accesses race."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with FakeCuda() as world:
            sim = CudaSim(world, model, slots, random.Random(seed), played=played)
            for _ in range(actions):
                sim.anything()
                if world.races:
                    break
            sim.close()
    finally:
        torch.set_num_threads(threads)
    return sim


def _tiles(inputs: StepInputs) -> list[int]:
    from aioengine.kernels.triton.plan import TilePlan

    plan = inputs.lora.derive(TilePlan)
    return sorted({slot for slot, _, tokens, _ in plan.tiles(16).tolist() if tokens})
