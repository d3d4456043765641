"""The bound of the adapters' CPU cache in bytes. No torch here."""

from __future__ import annotations

from aioengine.config import LoRAConfig
from aioengine.errors import ConfigError


def cpu_bound(lora: LoRAConfig, largest: int, size: int) -> int | None:
    """Return a rank's part of the CPU cache's bound, which counts all ranks' shares of the adapters. Raises
    ConfigError if the largest adapter that the slots allow could never be served, or if there is no room for
    the adapters in the slots.

    Where slots share a memory, the cache is bounded in bytes, too: at ``max_cpu_loras / max_loras`` (rounded
    up) times that memory.
    """
    bound = lora.max_cpu_lora_bytes
    if isinstance(lora.slot_memory, int):
        if not isinstance(bound, int):
            return lora.slot_memory * -(-lora.cpu_capacity // lora.max_loras)
        if bound < size * lora.slot_memory:
            raise ConfigError(
                f"max_cpu_lora_bytes={bound}: must be at least {size * lora.slot_memory}, the slot_memory of "
                "all ranks, because an adapter in a slot also stays in the CPU cache; raise "
                "max_cpu_lora_bytes or lower slot_memory"
            )
        return bound // size
    if not isinstance(bound, int):
        return None
    if bound < size * largest:
        raise ConfigError(
            f"max_cpu_lora_bytes={bound}: must be at least {size * largest}, so that an adapter of "
            f"max_lora_rank={lora.max_lora_rank} in every module can be served; raise it, or lower "
            "max_lora_rank"
        )
    return bound // size
