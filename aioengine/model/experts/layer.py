"""A layer's experts on plain tensors: each token goes through some of them, whose outputs are added up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from aioengine.kernels import Backend, ExpertPlan, LoRABatch, LoRAPool
from aioengine.kernels.portable import routing
from aioengine.model.adapted import AdaptedLinears
from aioengine.model.experts.spec import (
    DOWN,
    GATE_UP,
    ROUTER,
    SHARED_DOWN,
    SHARED_GATE,
    SHARED_GATE_UP,
    MixtureSpec,
)
from aioengine.model.linear import Linear


@dataclass(slots=True)
class Shared:
    """An expert that all tokens go through, and the gate of its outputs."""

    gate_up: Linear
    down: Linear
    gate: Linear


@dataclass(slots=True)
class Mixture:
    """A layer's router and experts."""

    router: Linear
    gate_up: Linear
    """All experts' gate and up: [experts * 2 * size, hidden]."""
    down: Linear
    """[experts * hidden, size]"""
    shared: Shared | None
    spec: MixtureSpec
    adapted: AdaptedLinears
    kernels: Backend
    activate: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls,
        linears: Mapping[str, Linear],
        spec: MixtureSpec,
        adapted: AdaptedLinears,
        kernels: Backend,
        activate: Callable[[Tensor], Tensor],
    ) -> Mixture:
        """Build it from linears by the names of :meth:`MixtureSpec.fused`."""
        shared = None
        if SHARED_GATE in linears:
            shared = Shared(linears[SHARED_GATE_UP], linears[SHARED_DOWN], linears[SHARED_GATE])
        parts = linears[ROUTER], linears[GATE_UP], linears[DOWN]
        return cls(*parts, shared, spec, adapted, kernels, activate)

    @property
    def linears(self) -> dict[str, Linear]:
        found = {ROUTER: self.router, GATE_UP: self.gate_up, DOWN: self.down}
        if self.shared is not None:
            shared = self.shared
            found |= {SHARED_GATE_UP: shared.gate_up, SHARED_DOWN: shared.down, SHARED_GATE: shared.gate}
        return found

    def forward(self, x: Tensor, pools: Mapping[str, LoRAPool], lora: LoRABatch) -> Tensor:
        """Return the experts' outputs for ``x`` [T, hidden]: [T, hidden]."""
        spec = self.spec
        router = self.router
        scores = routing.logits(x, router.weight, router.bias, pools.get(ROUTER), lora)
        weights, chosen = routing.choose(scores, spec.experts_per_token, normalized=spec.normalized)
        plan = ExpertPlan(chosen, spec.experts)
        out = plan.total(self._through_experts(x[plan.tokens], plan, pools, lora), weights)
        if self.shared is not None:
            out += self._through_shared(self.shared, x, pools, lora)
        return self.adapted.total(out, None, None, lora)

    def _through_experts(
        self, x: Tensor, plan: ExpertPlan, pools: Mapping[str, LoRAPool], lora: LoRABatch
    ) -> Tensor:
        """Return the experts' outputs for their rows: [S, hidden] -> [S, hidden]; of several ranks, a
        summand."""
        adapted = self.adapted
        pool = pools.get(GATE_UP)
        y = self.kernels.expert_linear(x, self.gate_up.weight, self.gate_up.bias, plan)
        adapted.adapt_outputs(x, y, pool, _rows(plan, pool, lora))
        x, pool = self.activate(y), pools.get(DOWN)
        y = self.kernels.expert_linear(x, self.down.weight, adapted.own_bias(self.down), plan)
        adapted.adapt_summand(x, y, pool, _rows(plan, pool, lora))
        return y

    def _through_shared(
        self, shared: Shared, x: Tensor, pools: Mapping[str, LoRAPool], lora: LoRABatch
    ) -> Tensor:
        y = self.adapted.split_outputs(shared.gate_up, x, pools.get(SHARED_GATE_UP), lora)
        y = self.adapted.summand(shared.down, self.activate(y), pools.get(SHARED_DOWN), lora)
        gate = routing.logits(x, shared.gate.weight, None, pools.get(SHARED_GATE), lora)
        return (gate.sigmoid() * y).to(y.dtype)


def _rows(plan: ExpertPlan, pool: LoRAPool | None, lora: LoRABatch) -> LoRABatch:
    """Return the rows of the tokens of ``lora`` by adapter and expert, for the linears of ``pool``."""
    if pool is None or not lora.segments:
        return lora
    return plan.lora(lora, pool.slots.per_slot, len(pool.modules))
