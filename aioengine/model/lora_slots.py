"""The pre-allocated adapter slots on the device, laid out for the fused linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.model.spec import LORA_MODULES, ModelSpec

FUSED_MODULES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The decoder's linears and the modules that each fuses, in the order of its output columns."""


class Adapter(Protocol):
    """What :meth:`LoRASlots.write` reads of an :class:`aioengine.adapters.peft.PackedAdapter`."""

    @property
    def rank(self) -> int: ...

    @property
    def tensors(self) -> Mapping[tuple[int, str], tuple[Tensor, Tensor]]: ...


class FusedLoRA(NamedTuple):
    """One layer's pool for one fused linear with n targeted slices: S slots, maximum rank R."""

    modules: tuple[str, ...]
    a: Tensor
    """[S, n * R, in]"""
    b: tuple[Tensor, ...]
    """n tensors [S, out, R]"""
    offsets: tuple[int, ...]
    """First output column of each slice in the fused linear."""


class LoRASlots:
    """``max_loras`` slots of ``max_rank``, for ``target_modules`` (of :data:`LORA_MODULES`) in all layers.

    A slot takes exactly ``max_rank * (in + out)`` elements for every targeted linear of every layer.
    ``layers[i]`` maps the fused linear's name ("qkv", "o", "gate_up", "down") to its pool.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_loras: int,
        max_rank: int,
        target_modules: Iterable[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        targets = set(target_modules)
        if unknown := sorted(targets - set(LORA_MODULES)):
            raise ConfigError(
                f"target_modules: {unknown} cannot be targeted; allowed: {', '.join(LORA_MODULES)}"
            )
        self.spec = spec
        self.max_loras = max_loras
        self.max_rank = max_rank
        self.target_modules = tuple(m for m in LORA_MODULES if m in targets)

        def allocate(fused: tuple[str, ...]) -> FusedLoRA | None:
            offsets, end = {}, 0
            for module in fused:
                offsets[module] = end
                end += spec.linear(module).out_features
            modules = tuple(m for m in fused if m in targets)
            if not modules:
                return None
            rows, n_in = len(modules) * max_rank, spec.linear(modules[0]).in_features
            return FusedLoRA(
                modules,
                torch.zeros(max_loras, rows, n_in, dtype=dtype, device=device),
                tuple(
                    torch.zeros(max_loras, spec.linear(m).out_features, max_rank, dtype=dtype, device=device)
                    for m in modules
                ),
                tuple(offsets[m] for m in modules),
            )

        self.layers: list[dict[str, FusedLoRA]] = []
        for _ in range(spec.num_layers):
            pools = {name: allocate(fused) for name, fused in FUSED_MODULES.items()}
            self.layers.append({name: pool for name, pool in pools.items() if pool is not None})

    @property
    def nbytes(self) -> int:
        return sum(self.nbytes_by_module.values())

    @property
    def nbytes_by_module(self) -> dict[str, int]:
        """Bytes allocated for each targeted module, all layers and slots together."""
        sizes = dict.fromkeys(self.target_modules, 0)
        for pools in self.layers:
            for pool in pools.values():
                for module, b in zip(pool.modules, pool.b, strict=True):
                    sizes[module] += pool.a.nbytes // len(pool.modules) + b.nbytes
        return sizes

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copies an adapter into a slot and zeroes whatever of the slot it does not cover.

        May run in another thread while a step reads *other* slots. Raises :class:`ConfigError`,
        before a byte is written, if the slot does not exist or the adapter does not fit the pool.
        """
        self._check(slot, adapter)
        for layer, pools in enumerate(self.layers):
            for pool in pools.values():
                a_slices = pool.a[slot].view(len(pool.modules), self.max_rank, -1)
                for module, a_pool, b_pool in zip(pool.modules, a_slices, pool.b, strict=True):
                    rank = 0
                    if (pair := adapter.tensors.get((layer, module))) is not None:
                        a, b = pair
                        rank = a.shape[0]
                        a_pool[:rank].copy_(a)
                        b_pool[slot, :, :rank].copy_(b)
                    a_pool[rank:].zero_()
                    b_pool[slot, :, rank:].zero_()

    def _check(self, slot: int, adapter: Adapter) -> None:
        if not 0 <= slot < self.max_loras:
            raise ConfigError(f"slot {slot}: there are max_loras={self.max_loras} slots")
        if adapter.rank > self.max_rank:
            raise ConfigError(f"adapter rank {adapter.rank} exceeds max_lora_rank={self.max_rank}")
        for (layer, module), (a, b) in adapter.tensors.items():
            where = f"adapter tensors of layer {layer}, {module}"
            if not 0 <= layer < len(self.layers) or module not in self.target_modules:
                raise ConfigError(
                    f"{where}: the slots hold {', '.join(self.target_modules)} of "
                    f"{len(self.layers)} layers; add the module to target_modules"
                )
            rank, (n_in, n_out) = a.shape[0], self.spec.linear(module)
            expected = ((rank, n_in), (n_out, rank))
            if (tuple(a.shape), tuple(b.shape)) != expected or rank > adapter.rank:
                raise ConfigError(
                    f"{where}: expected A and B of shapes {expected} with rank <= {adapter.rank}, "
                    f"found {tuple(a.shape)} and {tuple(b.shape)}"
                )
