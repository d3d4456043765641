"""Memory that an engine will take, computed to the byte before anything is allocated. No torch here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from aioengine.checks import format_bytes
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.model.coverage import check_int8_adapters, check_kv_cache
from aioengine.model.cuda.working_memory import DETAILS, working_memory
from aioengine.model.files.quantized import with_quantization
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.parallel.group import Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.slots.cpu_bound import cpu_bound
from aioengine.model.slots.layout import Elements, SlotLayout
from aioengine.model.spec import DTYPE_BYTES, ModelSpec

MAX_AUTO_MODEL_LEN = 8192
MAX_AUTO_KV_ON_CPU = 4 * 2**30
AUTO_KV_ON_CUDA = 0.97
"""Share of what is left on a GPU that the KV cache takes; the rest is for what a plan cannot know."""
AUTO_TOKENS_ON_CPU = 512
"""Usual length of a request, prompt and output together, for which a CPU's KV cache has room. Memory that is
not needed is left to other programs."""


class Part(NamedTuple):
    """A part of the memory."""

    name: str
    detail: str
    """How its size is computed."""
    nbytes: int
    change: str = ""
    """What to change so that it takes less."""
    counts: bool = True
    """Whether the total has it: it is in the device's memory, and not within another part."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes in bytes, for each rank of ``tensor_parallel_size``. On a CPU everything is in one memory, so
    all of it counts, and the ranks share the available bytes."""

    device: str
    dtype: str
    lora_dtype: str
    max_model_len: int
    num_blocks: int
    block_size: int
    block_bytes: int
    """One KV block over all layers."""
    num_slots: int = 0
    slot_bytes: int = 0
    """A slot for the largest rank in all targeted modules."""
    slot_memory: int | None = None
    """Bytes that the slots share; None: slots of one size."""
    cpu_max_bytes: int | None = None
    """The CPU cache's bound in bytes, if it has one: a rank's part."""
    available_bytes: int
    num_ranks: int = 1
    parts: tuple[Part, ...] = ()
    """What takes the memory; the parts of a slot come after the slot pool."""

    def bytes_of(self, *names: str) -> int:
        """Return what the parts of these names take together."""
        return sum(part.nbytes for part in self.parts if part.name in names)

    @property
    def total_bytes(self) -> int:
        """Bytes that are taken from the device's memory (on a CPU the adapter cache included)."""
        return sum(part.nbytes for part in self.parts if part.counts)

    def rows(self) -> list[tuple[str, str, int]]:
        """Return (part, how it is computed, bytes), for a table; the last row is the total."""
        rows = [part[:3] for part in self.parts]
        return [*rows, ("total", f"of {self._available} available", self.total_bytes)]

    @property
    def _available(self) -> str:
        each = f" for each of {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        return f"{format_bytes(self.available_bytes)}{each}"

    def check_it_fits(self) -> None:
        """Raise ConfigError if it does not fit: by how much, and what to change, the largest part first."""
        total = self.total_bytes
        if total <= self.available_bytes:
            return
        parts = [part for part in self.parts if part.counts]
        changes = (part.change for part in sorted(parts, key=lambda part: -part.nbytes) if part.nbytes)
        sizes = ", ".join(f"{part.name} {format_bytes(part.nbytes)}" for part in parts)
        raise ConfigError(
            f"the plan needs {format_bytes(total)} on {self.device} but {self._available} are available, "
            f"{format_bytes(total - self.available_bytes)} too little: {sizes}; "
            + ", or ".join(dict.fromkeys(filter(None, changes)))
        )


def plan_memory(
    spec: ModelSpec, config: EngineConfig, *, device: str, available_bytes: int | None = None
) -> MemoryPlan:
    """Plan for a model on a device ("cpu" or "cuda"). On CUDA every rank has a device of its own. Raises
    ConfigError if it does not fit into ``available_bytes`` (default: the device's free bytes), or the model
    cannot be divided by ``tensor_parallel_size``."""
    if spec.impl == "transformers":
        config = msgspec.structs.replace(config, model_impl="transformers")  # refused beside some settings
    if available_bytes is None:
        available_bytes = available_memory(device)
    lora, size = config.lora, config.tensor_parallel_size
    if device == "cpu":
        available_bytes //= size
    shard = Shard(0, size, lora is not None and lora.fully_sharded_loras)
    spec = with_quantization(spec, config.quantization, device, size)
    check_kv_cache(config.kv_cache_dtype, spec, "triton" if device == "cuda" else device)
    local = Partition(spec, shard).local
    dtype: str = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if spec.dtype == "float16" and device == "cpu" else spec.dtype
    dtype_bytes = DTYPE_BYTES[dtype]
    max_model_len = config.max_model_len or min(spec.max_position, MAX_AUTO_MODEL_LEN)
    if max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len={max_model_len}: the model's positions end at {spec.max_position}; "
            "lower max_model_len, or scale the model's RoPE in its config.json"
        )
    weights = dtype if config.quantization == "none" else config.quantization
    if local.packed and config.quantization == "none":
        formats = sorted({packing.format for packing in local.packed.values()})
        weights = f"{', '.join(formats)} as stored, the rest {dtype}"
    kv_bytes = 1 if config.kv_cache_dtype == "fp8" else dtype_bytes
    token_bytes = local.kv_bytes_per_token(kv_bytes, int8=config.kv_cache_dtype == "int8")
    plan = MemoryPlan(
        device=device,
        dtype=dtype,
        lora_dtype=dtype,
        max_model_len=max_model_len,
        num_blocks=0,
        block_size=config.block_size,
        block_bytes=config.block_size * token_bytes,
        available_bytes=available_bytes,
        num_ranks=size,
        parts=(Part("base weights", weights, local.weights_bytes(dtype_bytes, config.quantization)),),
    )
    if lora is not None:
        plan = _with_slots(plan, spec, lora, shard)
    if device != "cpu":
        working = working_memory(spec, local, config, dtype_bytes=dtype_bytes, max_model_len=max_model_len)
        less = "lower max_num_batched_tokens or max_num_seqs"
        parts = (Part(name, DETAILS[name], size, less) for name, size in working.items() if size)
        plan = msgspec.structs.replace(plan, parts=(*plan.parts, *parts))
    plan = _with_blocks(plan, config)
    plan.check_it_fits()
    return plan


def _with_slots(plan: MemoryPlan, spec: ModelSpec, lora: LoRAConfig, shard: Shard) -> MemoryPlan:
    """Add what adapters take to a plan."""
    lora_dtype = plan.dtype if lora.lora_dtype == "auto" else lora.lora_dtype
    int8 = lora_dtype == "int8"
    if int8:
        check_int8_adapters(plan.dtype)
    holds = Elements(int8, DTYPE_BYTES[plan.dtype] if int8 else 1)
    targets = spec.targets(lora.target_modules)
    layout = SlotLayout(spec, lora.max_lora_rank, targets, shard, holds, lora.max_trained_tokens)
    elements = {**layout.matrix_elements_by_module, "DoRA and biases": layout.affine_elements}
    elements["trained tokens"] = layout.token_elements
    each = 1 if int8 else DTYPE_BYTES[lora_dtype]
    slot_bytes = sum(elements.values()) * each
    slot, slots = format_bytes(slot_bytes), lora.max_loras
    if isinstance(lora.slot_memory, int):
        how, nbytes, less = f"shared by at most {slots} adapters", lora.slot_memory, "lower lora.slot_memory"
        elements = {}
    else:
        how, nbytes = f"{slots} slots x {slot}", slots * slot_bytes
        less = f"lower lora.max_loras (each slot takes {slot}) or lora.max_lora_rank"
    bound = cpu_bound(lora, slot_bytes, plan.num_ranks)
    cache, cached = f"{lora.cpu_capacity} adapters x {slot} at most", lora.cpu_capacity * slot_bytes
    if bound is not None:
        cache, cached = f"{cache}, bound to {format_bytes(bound)}", min(cached, bound)
    here = plan.device == "cpu"
    parts = [
        Part("slot pool", f"{how}, {lora_dtype}", nbytes, less),
        *(
            Part(f"slot pool: {name}", f"x {format_bytes(count * each)}", slots * count * each, counts=False)
            for name, count in elements.items()
            if count
        ),
        Part(
            *("CPU adapter cache", f"{cache}{'' if here else ' (host memory)'}", cached),
            change=f"lower lora.max_cpu_loras ({slot} each)",
            counts=here,
        ),
    ]
    return msgspec.structs.replace(
        plan,
        lora_dtype=lora_dtype,
        num_slots=slots,
        slot_bytes=slot_bytes,
        slot_memory=lora.slot_memory if isinstance(lora.slot_memory, int) else None,
        cpu_max_bytes=bound,
        parts=(*plan.parts, *parts),
    )


def _with_blocks(plan: MemoryPlan, config: EngineConfig) -> MemoryPlan:
    """Add the KV blocks, enough for one request of the full length. Raises ConfigError if ``kv_cache_memory``
    is less than that."""
    each, given = -(-plan.max_model_len // plan.block_size), config.kv_cache_memory
    smallest = each * plan.block_bytes
    if isinstance(given, int):
        if given < smallest:
            raise ConfigError(
                f"kv_cache_memory={format_bytes(given)} is less than one request of "
                f"max_model_len={plan.max_model_len} tokens needs ({format_bytes(smallest)}); raise "
                f"kv_cache_memory by {format_bytes(smallest - given)} or lower max_model_len"
            )
        count = given // plan.block_bytes
    else:
        left = plan.available_bytes - plan.total_bytes
        usual, bound = each, int(left * AUTO_KV_ON_CUDA)
        if plan.device == "cpu":
            usual = min(each, -(-AUTO_TOKENS_ON_CPU // plan.block_size))
            bound = min(left // 2, MAX_AUTO_KV_ON_CPU)
        wanted = config.max_num_seqs * usual * plan.block_bytes
        count = max(min(wanted, bound), smallest) // plan.block_bytes
    dtype = "" if config.kv_cache_dtype == "auto" else f", {config.kv_cache_dtype}"
    token = format_bytes(plan.block_bytes // plan.block_size)
    how = f"{count} blocks x {plan.block_size} tokens x {token}{dtype}; a request holds at most {each}"
    # Without kv_cache_memory there are no more blocks than one request needs, where all do not fit.
    less = "lower kv_cache_memory" if count > each else "lower max_model_len"
    blocks = Part("KV blocks", how, count * plan.block_bytes, less)
    return msgspec.structs.replace(plan, num_blocks=count, parts=(*plan.parts, blocks))


def spec_of_a_rank(spec: ModelSpec, size: int) -> ModelSpec:
    """Return what each rank has of a model that ``size`` ranks share. Raises ConfigError if it does not
    divide."""
    return Partition(spec, Shard(0, size)).local


def spec_from_config(config: EngineConfig, progress: LoadProgress | None = None) -> ModelSpec:
    """Read the model's description, not its weights. ``progress`` is called if the model must be converted
    first. Raises ConfigError if it is not available, or not supported."""
    return read_spec(resolve_model(config.model, progress), config.model_impl, config.quantization)


def resolve_device(device: str) -> str:
    """Return "cpu" or "cuda". Asks torch only if necessary. Raises ConfigError if there is no CUDA device."""
    if device == "cpu" or (device == "auto" and "torch" not in sys.modules and not _may_have_gpu()):
        return "cpu"
    import torch  # only now, so that a plan for the CPU does not need it

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ConfigError("device='cuda': torch finds no CUDA device; use device='cpu' or 'auto'")
    return "cpu"


def _may_have_gpu() -> bool:
    """Whether torch must be asked for a GPU, which takes two seconds of imports: on Linux only with a driver
    of CUDA (also on Jetson and in WSL) or ROCm."""
    places = ("proc/driver/nvidia", "dev/nvidiactl", "dev/nvmap", "dev/nvhost-ctrl-gpu", "dev/dxg", "dev/kfd")
    return sys.platform != "linux" or any(Path("/", place).exists() for place in places)


def available_memory(device: str) -> int:
    """Return the free bytes on the device; for "cpu", those within the limits of the system and of the
    process's control groups."""
    if device == "cuda":
        import torch  # only a CUDA plan needs it

        return int(torch.cuda.mem_get_info()[0])
    return min([int(psutil.virtual_memory().available), *rooms_in_groups()])


def rooms_in_groups(root: Path = Path("/")) -> Iterator[int]:
    """Yield the bytes that are left in this process's control group (version 2) and those above it, where
    they have a limit: a container's, or systemd's ``MemoryMax=``. ``root`` has the files of the system."""
    found = re.search(r"^0::/(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE)
    top = root / "sys/fs/cgroup"
    group = top / (found[1] if found else "")
    # In a container the path may be the host's, while the files are those of its own group.
    for folder in (parent for parent in (group, *group.parents) if parent.is_relative_to(top)):
        limit, used = _read(folder / "memory.max"), _read(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            # What was read from files counts as used, and is given back when memory is short.
            kept = re.search(r"^inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            yield max(0, int(limit) - int(used) + (int(kept[1]) if kept else 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
