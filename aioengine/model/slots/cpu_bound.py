"""The bound of the adapters' CPU cache in bytes. No torch here."""

from __future__ import annotations

from aioengine.config import LoRAConfig
from aioengine.errors import ConfigError


def cpu_bound(lora: LoRAConfig, largest: int, size: int) -> int | None:
    """Return a rank's part of the CPU cache's bound, which counts all ranks' shares of the adapters. Raises
    ConfigError if the largest adapter that the slots allow, or the adapters in the slots, have no room.

    Where slots share a memory, the cache is bounded in bytes, too: at ``max_cpu_loras / max_loras`` (rounded
    up) times that memory.
    """
    bound, shared = lora.max_cpu_lora_bytes, lora.slot_memory
    if not isinstance(bound, int):
        return shared * -(-lora.cpu_capacity // lora.max_loras) if isinstance(shared, int) else None
    least, why = size * largest, f"an adapter of max_lora_rank={lora.max_lora_rank} in every module"
    if isinstance(shared, int):
        least, why = size * shared, "all of slot_memory, because what is in a slot stays in the CPU cache"
    if bound < least:
        raise ConfigError(
            f"max_cpu_lora_bytes={bound}: must be at least {least}, the bytes of {why}; raise it, or lower "
            "the other one"
        )
    return bound // size
