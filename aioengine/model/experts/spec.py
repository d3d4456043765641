"""Description of decoders with experts: Shazeer et al., 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088.

No torch in this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from aioengine.model.spec import NO_LAYER, BareParameter, LinearShape, ModelSpec

ROUTER, GATE_UP, DOWN = "router", "experts_gate_up", "experts_down"
"""The router, and two matrices with those of all experts one below the other."""
SHARED_GATE_UP, SHARED_DOWN, SHARED_GATE = "shared_gate_up", "shared_down", "shared_gate"
"""The expert that all tokens go through, and the gate of what it adds."""

PLAIN = (ROUTER, SHARED_GATE)
"""Linears that stay as they are: small, and computed in float32."""

_EXPERT = re.compile(r"experts\.(0|[1-9][0-9]{0,5})\.(\w+)", re.ASCII)
_SHARED = "shared_expert"


class ExpertNames(msgspec.Struct, frozen=True, kw_only=True):
    """Names in a checkpoint, and those of PEFT's adapters that target modules."""

    block: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class MixtureSpec(ModelSpec, frozen=True, kw_only=True):
    """A decoder that sends each token to some of the experts that a layer has in the place of an MLP.

    The linears of expert 3 are called ``experts.3.gate_proj`` and so on, and all experts have the same.
    """

    experts: int
    experts_per_token: int
    expert_size: int
    """Intermediate size of an expert."""
    normalized: bool
    """Whether the weights of a token's experts are divided by their sum."""
    shared_size: int = 0
    """Intermediate size of an expert that all tokens go through; 0: there is none."""
    names: ExpertNames = ExpertNames()
    biased: bool = False
    """Whether the router and the experts' linears have biases."""
    interleaved: bool = False
    """Whether transformers has all experts of a layer in parameters [experts, in, out], in checkpoints, too;
    outputs of gate and up alternate there."""

    @property
    def plain_modules(self) -> tuple[str, ...]:
        """The modules in ``PLAIN``."""
        return (self.names.router, f"{_SHARED}_gate")

    @property
    def mlp_sizes(self) -> dict[str, int]:
        shared = {"intermediate size of the shared expert": self.shared_size} if self.shared_size else {}
        return {"intermediate size of an expert": self.expert_size, **shared}

    def linear(self, module: str) -> LinearShape:
        h, names = self.hidden_size, self.names
        if module in self.plain_modules:
            return LinearShape(h, self.experts if module == names.router else 1)
        parent, _, kind = module.rpartition(".")
        if not parent:
            return super().linear(module)
        size = self.shared_size if parent == _SHARED else self.expert_size
        return LinearShape(size, h) if kind in ("down_proj", names.down) else LinearShape(h, size)

    def kind_of(self, module: str) -> str:
        match = _EXPERT.fullmatch(module)
        return module if match is None else f"experts.{match[2]}"

    def experts_in(self, linear: str) -> int:
        return self.experts if linear in (GATE_UP, DOWN) else 0

    def has_bias(self, linear: str) -> bool:
        return self.biased if linear in (ROUTER, GATE_UP, DOWN) else super().has_bias(linear)

    @property
    def mlp_linears(self) -> Mapping[str, tuple[str, ...]]:
        names, every = self.names, range(self.experts)
        found: dict[str, tuple[str, ...]] = {
            ROUTER: (names.router,),
            GATE_UP: tuple(f"experts.{e}.{kind}" for e in every for kind in (names.gate, names.up)),
            DOWN: tuple(f"experts.{e}.{names.down}" for e in every),
        }
        if self.shared_size:
            found[SHARED_GATE_UP] = (f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj")
            found[SHARED_DOWN] = (f"{_SHARED}.down_proj",)
            found[SHARED_GATE] = (f"{_SHARED}_gate",)
        return found

    @property
    def mlp_block(self) -> str:
        return self.names.block

    def bare_parameters(self) -> Iterator[BareParameter]:
        names = self.names
        for layer in range(self.num_layers):
            for parameter, kinds in (("gate_up_proj", (names.gate, names.up)), ("down_proj", (names.down,))):
                experts = [
                    [self.module_name(layer, f"experts.{expert}.{kind}") for kind in kinds]
                    for expert in range(self.experts)
                ]
                owner = f"model.layers.{layer}.mlp.experts"
                yield BareParameter(owner, parameter, experts, self.interleaved)
        for layer, module in self.adaptable():
            if layer != NO_LAYER and not module.startswith("experts."):
                name = self.module_name(layer, module)
                yield BareParameter(name.replace(f".{names.block}.", ".mlp."), "weight", ((name,),))
