"""Processes that hold one model together, and scripts that they and a single process run alike."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from support.driver import Driver, Running
from support.preloaded import CONTEXT
from support.step_tokens import tokens_of
from torch import Tensor, distributed

from aioengine.adapters.store import Draft
from aioengine.errors import AdapterError
from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec
from aioengine.model.parallel.group import DistributedGroup, Group, Shard
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import TARGETABLE_MODULES, Quantization
from aioengine.step import Sampled, SequenceWork, StepResult

SECONDS = 120.0
"""After so long a job has hung, and its processes are killed."""

Job = Callable[..., Any]
"""Called as ``job(group, *arguments)``, in every process."""


class Ranks:
    """``size`` processes on this machine, over gloo or, with a GPU each, NCCL. They are started by the first
    job."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size = size
        self._backend = backend
        self._pools: list[Any] = []
        """One process each."""

    def run(self, job: Job, *arguments: Any, fully_sharded: bool = False) -> list[Any]:
        """What the job returns in each process. Raises the first one's error; all are killed then."""
        if not self._pools:
            self._start()
        ended: SimpleQueue[object] = SimpleQueue()
        asked = job, arguments, fully_sharded
        results = [pool.apply_async(_run, asked, {}, ended.put, ended.put) for pool in self._pools]
        try:
            for _ in results:
                if isinstance(error := ended.get(timeout=SECONDS), Exception):
                    raise error
            return [result.get() for result in results]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for pool in self._pools:
            pool.terminate()
            pool.join()
        if self._pools:
            self._folder.cleanup()
        self._pools = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = f"{self._folder.name}/store"
        for rank in range(self.size):
            self._pools.append(CONTEXT.Pool(1, _join, (self._backend, rank, self.size, store)))


def _join(backend: str, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file_store = distributed.FileStore(store, size)
    limit = timedelta(seconds=SECONDS)
    distributed.init_process_group(backend, store=file_store, rank=rank, world_size=size, timeout=limit)


def _run(job: Job, arguments: Sequence[Any], fully_sharded: bool) -> Any:
    assert distributed.group.WORLD is not None
    shard = Shard(distributed.get_rank(), distributed.get_world_size(), fully_sharded)
    return job(CountingGroup(distributed.group.WORLD, shard), *arguments)


class Phase(NamedTuple):
    """Slots are rewritten, which ends the sequences on them; then all sequences go on for some tokens."""

    loads: Mapping[int, Path] = {}
    prompts: Sequence[tuple[Sequence[int], int]] = ()
    """(tokens, slot)"""
    tokens: int = 4


class Script(NamedTuple):
    model: Path
    phases: Sequence[Phase]
    max_loras: int
    max_rank: int = 16
    kernels: str | None = "torch"
    target_modules: Sequence[str] = TARGETABLE_MODULES
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    """"cuda": each rank has a GPU of its own."""
    chunk: int = 9
    """Prompts are computed in pieces of so many tokens."""
    int8_adapters: bool = False
    quantization: Quantization = "none"


class Outcome(NamedTuple):
    """What a rank saw."""

    outputs: list[list[int]]
    logits: list[NDArray[np.float32]]
    """By step: [rows that sample, vocabulary]; of rank 0 alone."""
    compiled: bool
    """Whether steps were calls into the compiled library."""


def play(group: Group, script: Script) -> Outcome:
    """Greedy. What rank 0 samples is told to the others."""
    stage = Stage(group, script)
    everything: list[Running] = []
    active: list[Running] = []
    for phase in script.phases:
        active = [sequence for sequence in active if sequence.slot not in phase.loads]
        for slot, folder in phase.loads.items():
            stage.load(slot, folder)
        added = [stage.add(tokens, slot) for tokens, slot in phase.prompts]
        everything += added
        active += added
        stage.run(*active, new_tokens=phase.tokens, chunk=script.chunk)
    outputs, logits = [s.output for s in everything], [x.numpy() for x in stage.logits]
    return Outcome(outputs, logits, stage.runner.model.compiled)


class Held(NamedTuple):
    """What one rank holds."""

    rank: int
    image_bytes: int
    slot_bytes: int
    weight_bytes: int
    kv_bytes: int


def fail_in_exchange(group: Group, script: Script) -> str:
    """What a step raises whose third all-reduce fails, on all ranks."""
    stage = Stage(group, script)
    all_reduce, calls = group.all_reduce, count()

    def failing(x: Tensor) -> Tensor:
        if next(calls) == 2:
            raise ConnectionError("a rank is gone")
        return all_reduce(x)

    group.all_reduce = failing  # type: ignore[method-assign]
    try:
        stage.runner.execute(stage.batch((stage.add([5, 6, 7]), 3)))
    except ConnectionError as error:
        return f"{error} after {next(calls)} calls"
    return "nothing"


def hold(group: Group, script: Script, folder: Path) -> Held:
    stage = Stage(group, script)
    image = stage.load(0, folder)
    runner, slots = stage.runner, stage.runner.lora_slots
    assert slots is not None
    kv_bytes = runner.kv_cache.nbytes
    return Held(image.rank, image.nbytes, slots.nbytes, runner.model.nbytes, kv_bytes)


def refusal(group: Group, script: Script, folder: Path) -> str:
    """The error that loading the adapter raises."""
    try:
        Stage(group, script).load(0, folder)
    except AdapterError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class CountingGroup(DistributedGroup):
    """A group that counts what a rank sends."""

    def __init__(self, process_group: Any, shard: Shard) -> None:
        super().__init__(process_group, shard)
        self.reset()

    def reset(self) -> None:
        self.all_reduces = self.all_gathers = 0
        """Numbers of calls."""
        self.nbytes = 0
        """Bytes that this rank sends if both are done in a ring, which is the least that they take:
        ``2 (size - 1) / size`` of an all-reduce's tensor (Patarasuk & Yuan, 2009,
        https://doi.org/10.1016/j.jpdc.2008.09.002), and ``size - 1`` times a gather's own part."""

    def all_reduce(self, x: Tensor) -> Tensor:
        self.all_reduces += 1
        self.nbytes += 2 * (self.shard.size - 1) * x.nbytes // self.shard.size
        return super().all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        self.all_gathers += 1
        self.nbytes += (self.shard.size - 1) * x.nbytes
        return super().all_gather(x)


def traffic(group: Group, script: Script) -> tuple[int, int, int, int]:
    """All-reduces, all-gathers and bytes of one step over the first phase's whole prompts, and the tokens."""
    stage = Stage(group, script)
    phase = script.phases[0]
    for slot, folder in phase.loads.items():
        stage.load(slot, folder)
    work = [(stage.add(tokens, slot), len(tokens)) for tokens, slot in phase.prompts]
    assert isinstance(group, CountingGroup)
    group.reset()
    stage.runner.execute(stage.batch(*work))
    return group.all_reduces, group.all_gathers, group.nbytes, sum(len(tokens) for tokens, _ in phase.prompts)


def times_held(layouts: Sequence[SlotLayout], module: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """How many of the ranks hold each element of a module's weight, and of an adapter's A and B of rank 5."""
    n_in, n_out = layouts[0].spec.linear(module)
    weight, a, b = np.zeros((n_out, n_in), int), np.zeros((5, n_in), int), np.zeros((n_out, 5), int)
    for layout in layouts:
        share, partition = layout.share(module), layout.partition
        for rows in partition.outputs(module):
            weight[rows, partition.inputs(module)] += 1
        a[share.a] += 1
        for rows in share.b:
            b[rows] += 1
    return weight, a, b


class Stage(Driver):
    """A runner of one rank with its adapters, stepped by hand."""

    def __init__(self, group: Group, script: Script) -> None:
        self.logits: list[Tensor] = []
        self._group = group
        lora_dtype = torch.int8 if script.int8_adapters else script.dtype
        runner = build_runner(
            read_spec(script.model),
            script.model,
            dtype=script.dtype,
            device=f"cuda:{group.shard.rank}" if script.device == "cuda" else script.device,
            num_blocks=128,
            block_size=16,
            max_loras=script.max_loras,
            max_lora_rank=script.max_rank,
            target_modules=script.target_modules,
            lora_dtype=lora_dtype,
            sample=self._sample,
            kernels=script.kernels,
            quantization=script.quantization,
            group=group,
        )
        super().__init__(runner, lora_dtype)

    def share(self, draft: Draft) -> None:
        if squares := draft.squares:  # with processes for ranks, the engine carries them
            mine = torch.frombuffer(bytearray(squares), dtype=torch.float32).to(self.runner.model.device)
            for theirs in self._group.all_gather(mine[:, None]).unbind(1):
                draft.add(bytes(theirs.cpu().view(torch.uint8).tolist()))

    def sampled(self, result: StepResult) -> list[Sequence[int]]:
        tokens = [-1 if not found else found[0] for found in tokens_of(result)]
        sampled = torch.tensor(tokens, device=self.runner.model.device)
        if self._group.shard.rank > 0:
            assert not result.tokens, "rank 0 samples"
            sampled.zero_()
        self._group.all_reduce(sampled)
        return [[token] if token >= 0 else [] for token in sampled.tolist()]

    def _sample(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        self.logits.append(logits.to("cpu", copy=True))
        return [Sampled(int(token)) for token in logits.argmax(-1)]
