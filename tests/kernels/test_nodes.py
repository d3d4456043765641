"""Threads that are bound to processors: which ones, on machines made of files; and nothing else changes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_slots import fill_slot
from support.tiny_models import build_model

from aioengine.config import EngineConfig
from aioengine.executors.parts import build_parts, plan_parts
from aioengine.kernels.cpu import build, nodes
from aioengine.kernels.cpu.cores import Cores
from aioengine.kernels.cpu.nodes import find_nodes, permitted, processors_of_threads, spread, touch
from aioengine.model.buffer import Buffer
from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import ModelImpl
from aioengine.request import SamplingParams
from aioengine.step import Sampled, SequenceWork, StepBatch

needs_compiler = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
needs_linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="binds threads on Linux only")


def listed(numbers: Iterable[int]) -> str:
    """Numbers as the kernel lists them: "0-3,8"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="ascii")


def build_machine(root: Path, machine: dict[int, list[list[int]]]) -> None:
    """Write the files of a machine: for each node the processors of each of its cores."""
    for node, found in machine.items():
        write(root / f"sys/devices/system/node/node{node}/cpulist", listed(n for core in found for n in core))
        for core in found:
            for number in core:
                path = root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
                write(path, listed(core))
    write(root / "sys/devices/system/node/online", listed(machine))  # not a node


@pytest.mark.parametrize("seed", range(40))
def test_nodes_of_any_machine(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    numbers = list(range(200))
    rng.shuffle(numbers)
    machine: dict[int, list[list[int]]] = {}
    for node in sorted(rng.sample(range(20), rng.randrange(1, 5))):
        width = rng.choice([1, 2, 4])  # threads of a core; a node may have memory only
        machine[node] = [[numbers.pop() for _ in range(width)] for _ in range(rng.choice([0, 1, 3, 8]))]
    build_machine(tmp_path, machine)
    every = [number for found in machine.values() for core in found for number in core]
    # The process's cpuset and affinity mask: whole nodes may be left out, and one of a core's two threads.
    may = {number for number in every if rng.random() < rng.choice([0.5, 1.0])}
    expected = []
    for node in sorted(machine):
        firsts = [min(may & set(core)) for core in machine[node] if may & set(core)]
        expected += [sorted(firsts)] if firsts else []
    assert find_nodes(may, tmp_path) == (expected or [])


def test_a_system_that_tells_nothing_is_one_node(tmp_path: Path) -> None:
    assert find_nodes([3, 1], tmp_path) == [[1, 3]]
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-2")  # 3 is in no node
    assert find_nodes([3, 1], tmp_path) == [[1, 3]]


@pytest.mark.parametrize("seed", range(40))
def test_threads_are_spread_over_the_nodes(seed: int) -> None:
    rng = random.Random(seed)
    numbers = list(range(100))
    rng.shuffle(numbers)
    machine = [
        sorted(numbers.pop() for _ in range(rng.choice([1, 4, 6]))) for _ in range(rng.choice([1, 2, 4]))
    ]
    total, ranks = sum(map(len, machine)), rng.choice([1, 1, 2, 3])
    count = rng.randrange(1, total + 2)
    of_ranks = [spread(machine, count, rank, ranks) for rank in range(ranks)]
    node_of = {number: i for i, node in enumerate(machine) for number in node}
    for rank, found in enumerate(of_ranks):
        room = (rank + 1) * total // ranks - rank * total // ranks
        assert len(found) == (count if count <= room else 0) and len(set(found)) == len(found)
        places = [node_of[number] for number in found]
        assert places == sorted(places)  # a node's threads follow each other
        if ranks == 1 and found and len({len(node) for node in machine}) == 1:
            each = [places.count(i) for i in range(len(machine))]
            assert max(each) - min(each) <= 1
    taken = [number for found in of_ranks for number in found]
    assert len(set(taken)) == len(taken)  # ranks do not share cores
    for before, after in pairwise(found for found in of_ranks if found):
        assert node_of[before[-1]] <= node_of[after[0]]


TWO, ONE = ((0, 1), (2, 3)), ((0, 1, 2, 3),)


@needs_linux
@pytest.mark.parametrize(
    ("machine", "threads", "quota", "ranks", "expected"),
    [
        (TWO, 4, 8.0, 1, [0, 1, 2, 3]),
        (ONE, 4, 8.0, 1, []),  # on one node nothing changes
        (TWO, 2, 8.0, 1, []),  # others are expected on the rest of the cores
        (TWO, 4, 2.5, 1, []),  # a container that has a part of the machine's time
        (TWO, 2, 8.0, 2, [0, 1]),
        (TWO, 1, 8.0, 3, [0]),  # a core is left over
        (TWO, 5, 8.0, 1, []),
    ],
)
def test_who_is_bound(
    monkeypatch: pytest.MonkeyPatch,
    machine: nodes.Nodes,
    threads: int,
    quota: float,
    ranks: int,
    expected: list[int],
) -> None:
    monkeypatch.setattr(nodes, "_nodes", lambda: machine)
    monkeypatch.setattr(nodes, "threads", lambda: threads)
    monkeypatch.setattr(nodes, "cores", lambda: Cores(4, 4, quota))
    assert processors_of_threads(0, ranks) == expected


@needs_linux
@needs_compiler
def test_threads_are_bound_while_the_library_works(masks: None) -> None:
    mine = sorted(os.sched_getaffinity(0))
    for processors in ([mine[0]] * 2, [mine[-1], mine[0]], mine[:1] * 3):
        array = torch.tensor(processors, dtype=torch.int32)
        on = torch.full((len(processors),), -1, dtype=torch.int32)
        nodes.load().aio_probe_bound(array.data_ptr(), len(processors), on.data_ptr())
        assert on.tolist() == processors


@needs_linux
@needs_compiler
def test_a_processor_that_is_not_there_binds_nobody(masks: None) -> None:
    mine = os.sched_getaffinity(0)
    for number in (1023, 5000):
        array, on = torch.tensor([number], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        nodes.load().aio_probe_bound(array.data_ptr(), 1, on.data_ptr())
        assert on.item() in mine


@needs_linux
@needs_compiler
def test_processors_are_used_if_the_system_keeps_threads_there(
    masks: None, caplog: pytest.LogCaptureFixture
) -> None:
    mine = sorted(os.sched_getaffinity(0))
    assert permitted([]) == () and permitted(mine) == mine and not caplog.messages
    for number in (1023, 5000):  # not there, and beyond what the library can ask for
        caplog.clear()
        assert permitted([mine[0], number]) == ()
        assert len(caplog.messages) == 1 and f"[{mine[0]}, {number}]" in caplog.text


@needs_linux
@needs_compiler
@pytest.mark.parametrize("rows", [16, 48, 576, 49152])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_pages_are_there_and_bytes_as_before(masks: None, rows: int, count: int) -> None:
    """Whoever writes to them first, all pages of a matrix are written to, and none beyond it."""
    processors = [min(os.sched_getaffinity(0))] * count
    before, size, after = 64, rows * 64, 3 << 20
    memory = Buffer(before + size + after).tensor
    memory[before] = 7
    touch(memory[before : before + size], rows, processors)
    assert memory[before] == 7 and int(memory[before : before + size].count_nonzero()) == 1
    whole = Buffer(size).tensor
    resident = resident_bytes()
    touch(whole, rows, processors)
    grown = resident_bytes() - resident
    assert grown >= size // 4096 * 4096 - (256 << 10)


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@needs_linux
@needs_compiler
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_bound_step_gives_the_same_bits(
    masks: None, several_nodes: list[int], tmp_path: Path, quantization: str
) -> None:
    model = build_model(tmp_path, "llama")
    assert torch.equal(logits(model, quantization, True), logits(model, quantization, False))


def logits(model: Path, quantization: str, bind: bool) -> torch.Tensor:
    found = []

    def sample(rows: torch.Tensor, works: Sequence[SequenceWork]) -> list[Sampled]:
        found.append(rows.clone())
        return [Sampled(0) for _ in works]

    runner = build_runner(
        *(read_spec(model), model), dtype=torch.bfloat16, device="cpu", num_blocks=8, block_size=16,
        max_loras=1, max_lora_rank=8, quantization=quantization, sample=sample, bind_threads=bind,
    )  # fmt: skip
    assert runner.model.compiled and runner.lora_slots is not None and bool(runner.model.processors) is bind
    fill_slot(runner.lora_slots, 0, 8, torch.Generator().manual_seed(0))
    ids = list(range(5, 25))
    work = SequenceWork("0", 0, ids, 0, [0, 1], True, SamplingParams(), 0, ids, len(ids))
    runner.execute(StepBatch(0, [work], [8]))
    return found[0]


@pytest.fixture
def masks() -> Iterable[None]:
    """Checks that every thread of the process may be where it could be before."""
    kept = {int(task): os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}
    mine = os.sched_getaffinity(0)
    yield
    for task in map(int, os.listdir("/proc/self/task")):
        assert os.sched_getaffinity(task) == kept.get(task, mine)


@pytest.fixture
def several_nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processors for the threads of a step, as on a machine with several nodes. Here there may be fewer."""
    mine = sorted(os.sched_getaffinity(0))
    found = [mine[i % len(mine)] for i in range(nodes.threads())]
    monkeypatch.setattr(nodes, "processors_of_threads", lambda rank, ranks: found)
    return found


@needs_linux
@needs_compiler
@pytest.mark.parametrize(
    ("impl", "dtype", "block_size", "lora_dtype", "bound"),
    [
        ("native", torch.float32, 16, None, True),
        ("native", torch.float16, 16, None, False),
        ("native", torch.float32, 8, None, False),
        ("native", torch.float32, 16, torch.bfloat16, False),
        ("transformers", torch.float32, 16, None, False),
    ],
)
def test_only_threads_of_the_compiled_step_are_bound(
    several_nodes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    impl: ModelImpl,
    dtype: torch.dtype,
    block_size: int,
    lora_dtype: torch.dtype | None,
    bound: bool,
) -> None:
    """Elsewhere no weight is written to, either, by a thread that will not read it."""
    touched = []
    monkeypatch.setattr(nodes, "touch", lambda *_: touched.append(1))
    model = build_model(tmp_path, "llama")
    runner = build_runner(
        *(read_spec(model, impl), model), dtype=dtype, device="cpu", num_blocks=8, block_size=block_size,
        max_loras=1, max_lora_rank=8, lora_dtype=lora_dtype,
    )  # fmt: skip
    assert (runner.model.compiled, bool(touched)) == (bound, bound)
    assert list(runner.model.processors) == (several_nodes if bound else [])


@needs_linux
@needs_compiler
@pytest.mark.parametrize(
    ("settings", "bound"), [({}, True), ({"bind_threads": False}, False), ({"executor": "ray"}, False)]
)
def test_engines_whose_ranks_are_all_here_are_bound(
    several_nodes: list[int], tmp_path: Path, settings: dict[str, Any], bound: bool
) -> None:
    config = EngineConfig(model=str(build_model(tmp_path, "llama")), device="cpu", **settings)
    assert list(build_parts(config, plan_parts(config)).runner.model.processors) == (
        several_nodes if bound else []
    )


@needs_linux
@needs_compiler
def test_an_engine_starts_where_the_system_keeps_no_thread_in_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(nodes, "processors_of_threads", lambda rank, ranks: [1023] * nodes.threads())
    config = EngineConfig(model=str(build_model(tmp_path, "llama")), device="cpu")
    assert not build_parts(config, plan_parts(config)).runner.model.processors
    assert sum("they are not bound" in message for message in caplog.messages) == 1
