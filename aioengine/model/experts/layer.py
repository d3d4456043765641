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
class Mixture:
    """A layer's router and experts."""

    linears: Mapping[str, Linear]
    """By the names of :attr:`MixtureSpec.mlp_linears`: those of all experts one below the other."""
    spec: MixtureSpec
    adapted: AdaptedLinears
    kernels: Backend
    activate: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, pools: Mapping[str, LoRAPool], lora: LoRABatch) -> Tensor:
        """Return the experts' outputs for ``x`` [T, hidden]: [T, hidden]."""
        spec, router = self.spec, self.linears[ROUTER]
        scores = routing.logits(x, router.weight, router.bias, pools.get(ROUTER), lora)
        weights, chosen = routing.choose(scores, spec.experts_per_token, normalized=spec.normalized)
        plan = ExpertPlan(chosen, spec.experts)
        out = plan.total(self._through_experts(x[plan.tokens], plan, pools, lora), weights)
        if SHARED_GATE in self.linears:
            out += self._through_shared(x, pools, lora)
        return self.adapted.total(out, None, lora)

    def _through_experts(
        self, x: Tensor, plan: ExpertPlan, pools: Mapping[str, LoRAPool], lora: LoRABatch
    ) -> Tensor:
        """Return the experts' outputs for their rows: [S, hidden] -> [S, hidden]; of several ranks, a
        summand."""
        adapted, gate_up, down = self.adapted, self.linears[GATE_UP], self.linears[DOWN]
        pool = pools.get(GATE_UP)
        y = self.kernels.expert_linear(x, gate_up.weight, gate_up.bias, plan)
        adapted.adapt_outputs(x, y, pool, _rows(plan, pool, lora))
        x, pool = self.activate(y), pools.get(DOWN)
        y = self.kernels.expert_linear(x, down.weight, adapted.own_bias(down), plan)
        adapted.adapt_summand(x, y, pool, _rows(plan, pool, lora))
        return y

    def _through_shared(self, x: Tensor, pools: Mapping[str, LoRAPool], lora: LoRABatch) -> Tensor:
        shared = self.linears
        y = self.adapted.split_outputs(shared[SHARED_GATE_UP], x, pools.get(SHARED_GATE_UP), lora)
        x_down, down = self.activate(y), shared[SHARED_DOWN]
        y = self.kernels.linear(x_down, down.weight, self.adapted.own_bias(down))
        self.adapted.adapt_summand(x_down, y, pools.get(SHARED_DOWN), lora)
        gate = routing.logits(x, shared[SHARED_GATE].weight, None, pools.get(SHARED_GATE), lora)
        return (gate.sigmoid() * y).to(y.dtype)


def _rows(plan: ExpertPlan, pool: LoRAPool | None, lora: LoRABatch) -> LoRABatch:
    """Return the rows of the tokens of ``lora`` by adapter and expert, for the linears of ``pool``."""
    if pool is None or not lora.segments:
        return lora
    return plan.lora(lora, pool.slots.per_slot, len(pool.modules))
