"""Forwards on a GPU that computes nothing; each function runs in a process of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from support import fake_gpu
from torch import Tensor

if TYPE_CHECKING:
    from aioengine.model.decode_graphs import DecodeSteps, Record
    from aioengine.model.parallel.group import Group, Shard

DTYPE = torch.bfloat16
META = torch.device("meta")
BLOCK = 16
MAX_MODEL_LEN = 8192


class Row(NamedTuple):
    """A sequence in a step: slot (-1: the base model), first position, tokens, and whether one is sampled."""

    slot: int
    start: int
    count: int
    sample: bool = True


class Model:
    """A decoder with slots and a KV cache on the meta device, as :class:`ModelRunner` puts them together."""

    def __init__(self, spec: object, *, slots: int = 8, rank: int = 16, **options: object) -> None:
        self.gpu = fake_gpu.install()
        self.gpu.reset()
        from aioengine.kernels.triton import backend
        from aioengine.model.decoder import Decoder
        from aioengine.model.kv_cache import KVCache
        from aioengine.model.parallel.group import SOLO
        from aioengine.model.parallel.partition import Partition
        from aioengine.model.slots.pool import LoRASlots
        from aioengine.model.spec import LORA_MODULES

        shard = options.get("shard")
        group = None if shard is None else _group(shard)
        modules = options.get("modules", LORA_MODULES)
        self.slots = LoRASlots(spec, slots, rank, modules, DTYPE, META, shard or SOLO)
        self.cache = KVCache(Partition(spec, shard or SOLO).local, 512, BLOCK, DTYPE, META)
        self.decoder = Decoder(spec, DTYPE, META, backend, self.cache, self.slots, group)
        self.ranks = [rank] * slots

    def forward(self, inputs: object) -> Tensor:
        with torch.inference_mode():
            return self.decoder.forward(inputs)

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Everything from a batch to its logits."""
        from aioengine.kernels import AttentionPlan, LoRABatch, Span
        from aioengine.kernels.transfer import send
        from aioengine.model.model import StepInputs

        rows = sorted(rows)
        ids: list[int] = []
        spans, sampled, places = [], [], []
        for row in rows:
            spans.append(Span(len(ids), row.count, row.start))
            ids += [0] * row.count
            if row.sample:
                sampled.append(row)
                places.append(len(ids) - 1)
        tables = [list(range(-(-(row.start + row.count) // BLOCK))) for row in rows]
        token_ids, sample_rows = send([torch.tensor(ids), torch.tensor(places, dtype=torch.long)], META)

        def batch(rows: Sequence[Row], counts: Sequence[int]) -> LoRABatch:
            slots = [row.slot for row in rows]
            return LoRABatch(slots, counts, self.ranks, META, slot_affine=[False] * len(self.ranks))

        inputs = StepInputs(
            token_ids,
            sample_rows,
            AttentionPlan(spans, tables, BLOCK, META),
            batch(rows, [row.count for row in rows]),
            batch(sampled, [1] * len(sampled)),
        )
        return self.forward(inputs)

    def recorded(self, max_num_seqs: int, max_model_len: int, record: Record | None = None) -> DecodeSteps:
        """Record steps, which compiles their kernels: by computing them once, unless said otherwise."""
        from aioengine.model.cuda.working_memory import mixed_sizes
        from aioengine.model.decode_graphs import DecodeLimits, DecodeSteps

        def once(step):  # type: ignore[no-untyped-def]
            step()
            return step

        model: Any = SimpleNamespace(
            forward=self.forward, slots=self.slots, spec=self.decoder.spec, dtype=DTYPE, device=META,
            cache=SimpleNamespace(block_size=BLOCK),
        )  # fmt: skip
        limits = DecodeLimits(max_num_seqs, max_model_len, mixed_sizes(2048))
        return DecodeSteps(model, self.decoder.partition.whole.vocab_size, limits, record or once)


def _group(shard: Shard) -> Group:
    from aioengine.model.parallel.group import Group

    class MetaGroup(Group):
        def __init__(self, shard: Shard) -> None:
            super().__init__(shard)
            self.log: list[str] = []
            """Every exchange, in order."""

        def all_reduce(self, tensor: Tensor) -> Tensor:
            assert tensor.is_contiguous() and tensor.device == META
            self.log.append(f"sum {tuple(tensor.shape)} {tensor.dtype}")
            return tensor

        def all_gather(self, tensor: Tensor) -> Tensor:
            self.log.append(f"gather {tuple(tensor.shape)} {tensor.dtype}")
            return tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] * self.shard.size)

    return MetaGroup(shard)


def llama(**changes: object) -> object:
    """Llama-3-8B's shapes, with few layers and tokens."""
    from aioengine.model.spec import ModelSpec, RopeSpec

    spec = ModelSpec(
        family="llama",
        vocab_size=512,
        hidden_size=4096,
        num_layers=1,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        rms_norm_eps=1e-5,
        max_position=131072,
        rope=RopeSpec(),
        tie_embeddings=False,
    )
    return msgspec.structs.replace(spec, **changes)


def _models(name: str) -> Model:
    from aioengine.model.parallel.group import Shard
    from aioengine.model.spec import LORA_MODULES

    everything = (*LORA_MODULES, "embed_tokens", "lm_head")
    match name:
        case "everything adapted":
            return Model(llama(), modules=everything)
        case "rank 1" | "rank 8" | "rank 320":
            return Model(llama(), rank=int(name.split()[1]))
        case "biases, norms, windows":
            return Model(
                llama(num_layers=2, qk_norm=True, qkv_bias=True, o_bias=True, sliding_windows=(None, 64))
            )
        case "seven query heads a key head":
            return Model(llama(num_heads=28, num_kv_heads=4, hidden_size=3584))
        case "half sharded":
            return Model(llama(), shard=Shard(1, 2))
        case "fully sharded":
            return Model(llama(), shard=Shard(1, 2, True), modules=everything)
    raise ValueError(name)


MODELS = (
    "everything adapted",
    "rank 1",
    "rank 8",
    "rank 320",
    "biases, norms, windows",
    "seven query heads a key head",
    "half sharded",
    "fully sharded",
)


def exchanges(steps: str) -> dict[str, list[list[str]]]:
    """By mode of sharding, what each of two ranks exchanges: while decode steps are recorded, and in random
    steps of which those that can be are played back, as a graph does it: in the recorded order."""
    from aioengine.model.parallel.group import Shard
    from aioengine.request import SamplingParams
    from aioengine.step import SequenceWork

    found = {}
    for fully_sharded in (False, True):
        logs = []
        for rank in range(2):
            model = Model(llama(), shard=Shard(rank, 2, fully_sharded))
            log = model.decoder.adapted.group.log  # type: ignore[attr-defined]

            def record(step, log=log):  # type: ignore[no-untyped-def]
                step()  # before the recording, as graphs are warmed up
                begin = len(log)
                step()
                recorded = [f"played {line}" for line in log[begin:]]
                return lambda: log.extend(recorded)

            played = model.recorded(8, 256, record=record)
            model.slots.has_affine[rank] = True  # it may differ, because nothing is exchanged for it
            rng = random.Random(0)
            for _ in range(int(steps)):
                log.append("step")
                count, kind = rng.randint(1, 10), rng.choice([1, 1, 1, 3])
                slots = sorted(rng.randrange(-1, 3) for _ in range(count))
                starts = [rng.randint(1, 200) for _ in slots]
                work = [
                    SequenceWork(
                        "", slot, [5] * kind, start, list(range(14)), True, SamplingParams(), 0, [], 0
                    )
                    for slot, start in zip(slots, starts, strict=True)
                ]
                if rng.random() < 0.2 or played.run(work, model.ranks) is None:
                    rows = zip(slots, starts, strict=True)
                    model.step([Row(slot, start, kind) for slot, start in rows])
            logs.append(list(log))
        found["fully sharded" if fully_sharded else "half sharded"] = logs
    return found


def jit_keys(steps: str) -> tuple[int, list[tuple[int, str]]]:
    """How many kernels an engine compiles at its start, and (step, JIT key) of those that random mixed steps
    need beside them."""
    model = Model(llama())
    model.recorded(64, MAX_MODEL_LEN)
    for rows in _first_steps(len(model.ranks), model.ranks[0]):
        model.step(rows)
    at_start = len(model.gpu.variants)
    rng = random.Random(0)
    slots = len(model.ranks)
    for number in range(int(steps)):
        model.gpu.step = number
        longest = rng.choice([100, 500, 2000, 7000])
        decodes = [
            Row(rng.randrange(-1, slots), rng.randint(1, longest), 1)
            for _ in range(rng.choice([0, 1, 2, 4, 8, 16, 32, 63]))
        ]
        prompts = [
            Row(rng.randrange(-1, slots), rng.choice([0, 0, 512]), rng.randint(2, 600), rng.random() < 0.7)
            for _ in range(rng.choice([1, 1, 2]))
        ]
        model.step([*decodes, *prompts])
    assert not model.gpu.faults
    return at_start, [(step, key) for key, step in model.gpu.variants.items() if step >= 0]


def _first_steps(slots: int, rank: int) -> list[list[Row]]:
    """Steps that an engine with these slots takes when it starts."""
    from aioengine import EngineConfig, LoRAConfig
    from aioengine.executors.warm_up import first_requests, kernel_shapes, largest_step
    from aioengine.memory_plan import MemoryPlan

    config = EngineConfig(model="none", lora=LoRAConfig(max_loras=slots, max_lora_rank=rank))
    plan = MemoryPlan(
        device="cuda",
        dtype="bfloat16",
        lora_dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        num_slots=slots,
        num_blocks=512,
        block_size=BLOCK,
        block_bytes=0,
        available_bytes=0,
    )
    batches = [*first_requests(plan), *kernel_shapes(plan, config), largest_step(plan, config)]
    return [
        [Row(work.slot, work.start, len(work.tokens), work.sample) for work in batch.sequences]
        for batch in batches
    ]


def working_memory() -> list[tuple[str, int, int]]:
    """(model and step, planned bytes of the layers, the most that were alive) for the largest steps."""
    from support.live_bytes import peak_of

    from aioengine import EngineConfig, LoRAConfig
    from aioengine.model.cuda.working_memory import working_memory as plan

    found = []
    for name in MODELS:
        model = _models(name)
        rank = model.ranks[0]
        for most, rows in (
            (2048, [Row(0, 0, 1024), Row(1, 0, 1024)]),
            (300, [*(Row(i % 8, MAX_MODEL_LEN - 100, 1) for i in range(63)), Row(1, 0, 237)]),
        ):
            config = EngineConfig(
                model="none",
                max_num_seqs=64,
                max_num_batched_tokens=most,
                tensor_parallel_size=model.decoder.partition.shard.size,
                executor="process",
                lora=LoRAConfig(max_loras=8, max_lora_rank=rank),
            )
            planned = plan(
                *(model.decoder.partition.whole, model.decoder.spec, config),
                dtype_bytes=DTYPE.itemsize,
                max_model_len=MAX_MODEL_LEN,
            )
            model.step(rows)  # what is made at the first step stays
            kind = "mixed" if len(rows) > 2 else "prompts"
            found.append(
                (f"{name}, {kind}", planned["activations"], peak_of("meta", partial(model.step, rows)))
            )
            assert not model.gpu.faults
    return found
