"""PEFT methods whose change of a weight is a low-rank product B @ A, and how to compute A and B for each.

The matrices of a module are given by the names of PEFT's parameters, in float32. The work is done in small
pieces, because torch would use several threads for larger ones (see :mod:`aioengine.adapters.peft.pack`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from aioengine.adapters.peft.config import PeftLoraConfig

Parts = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


Pair = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank]."""


class Method(NamedTuple):
    """A PEFT method that can be folded."""

    parts: Collection[str]
    """Names of the parameters that a module may have."""
    shared: Collection[str]
    """Names of the parameters that all modules share."""
    settings: Mapping[str, str | None]
    """Fields of its configuration -> the field of a LoRA configuration that means the same; None: the field
    matters in training only, or the shapes tell its value."""
    rank: Callable[[Shapes, int, int], int | None]
    """(shapes, outputs, inputs) -> the rank of the pair, or None if the shapes do not fit together."""
    fold: Callable[[Parts, Parts, int, int], Pair]
    """(the module's parameters, the shared ones, outputs, inputs) -> the pair, without the scaling."""
    scaling: Callable[[PeftLoraConfig, str], float]
    """(configuration, module's name) -> the factor of the pair."""


# AdaLoRA (arXiv:2303.10512): B diag(E) A


def _adalora_rank(shapes: Shapes, outputs: int, inputs: int) -> int | None:
    rank = shapes["lora_E"][0] if "lora_E" in shapes else 0
    fits = shapes == {"lora_A": (rank, inputs), "lora_B": (outputs, rank), "lora_E": (rank, 1)}
    return max(rank, 1) if fits else None


def _adalora(parts: Parts, shared: Parts, outputs: int, inputs: int) -> Pair:
    if not len(parts["lora_E"]):  # all of its ranks were pruned
        return torch.zeros(1, inputs), torch.zeros(outputs, 1)
    return scaled(parts["lora_A"], parts["lora_E"].flatten()), parts["lora_B"]


def _adalora_scaling(config: PeftLoraConfig, name: str) -> float:
    return (config.lora_alpha if config.lora_alpha > 0 else config.r) / (config.r + 1e-5)


# LoHa (FedPara, arXiv:2108.06098): the product of (w1_a @ w1_b) and (w2_a @ w2_b), element by element. Its
# rows are sums over all pairs of a column of w1_a and one of w2_a, so its rank is the product of both ranks.


def _loha_rank(shapes: Shapes, outputs: int, inputs: int) -> int | None:
    ranks = [shapes.get(f"hada_w{i}_b", (0,))[0] for i in (1, 2)]
    expected: dict[str, tuple[int, ...]] = {}
    for i, rank in zip((1, 2), ranks, strict=True):
        expected |= {f"hada_w{i}_a": (outputs, rank), f"hada_w{i}_b": (rank, inputs)}
    return ranks[0] * ranks[1] if shapes == expected and all(ranks) else None


def _loha(parts: Parts, shared: Parts, outputs: int, inputs: int) -> Pair:
    a = _row_products(parts["hada_w1_b"], parts["hada_w2_b"], torch.mul)
    b = _row_products(parts["hada_w1_a"].t(), parts["hada_w2_a"].t(), torch.mul)
    return a, b.t()


# LoKr (LyCORIS, arXiv:2309.14859): the Kronecker product of w1 and w2, each whole or a product itself; and
# the Kronecker product of two products is the product of Kronecker products.


def _lokr_factor(shapes: Shapes, name: str) -> tuple[int, int, int] | None:
    """(rows, rank, columns) of ``name``."""
    if name in shapes:
        if len(shapes[name]) != 2 or f"{name}_a" in shapes or f"{name}_b" in shapes:
            return None
        rows, columns = shapes[name]
        return rows, min(rows, columns), columns
    a, b = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ())
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        return None
    return a[0], a[1], b[1]


def _lokr_rank(shapes: Shapes, outputs: int, inputs: int) -> int | None:
    one, two = _lokr_factor(shapes, "lokr_w1"), _lokr_factor(shapes, "lokr_w2")
    if one is None or two is None:
        return None
    fits = (one[0] * two[0], one[2] * two[2]) == (outputs, inputs)
    return one[1] * two[1] or None if fits else None


def _lokr_pair(parts: Parts, name: str) -> Pair:
    if name not in parts:
        return parts[f"{name}_b"], parts[f"{name}_a"]
    whole = parts[name]
    rows, columns = whole.shape
    return (torch.eye(columns), whole) if columns <= rows else (whole, torch.eye(rows))


def _lokr(parts: Parts, shared: Parts, outputs: int, inputs: int) -> Pair:
    (a1, b1), (a2, b2) = _lokr_pair(parts, "lokr_w1"), _lokr_pair(parts, "lokr_w2")
    return _row_products(a1, a2, torch.kron), _row_products(b1.t(), b2.t(), torch.kron).t()


def _lycoris_scaling(config: PeftLoraConfig, name: str) -> float:
    return config.scaling(name, config.rank(name))


# VeRA (arXiv:2310.11454): diag(b) B diag(d) A, where A and B are random and all modules take their first
# rows and columns of them.


def _vera_rank(shapes: Shapes, outputs: int, inputs: int) -> int | None:
    rank = shapes.get("vera_lambda_d", (0,))[0]
    expected = {"vera_lambda_b": (outputs,), "vera_lambda_d": (rank,)}
    a, b = shapes.get("vera_A", ()), shapes.get("vera_B", ())
    own = {name: shape for name, shape in shapes.items() if name in expected}
    fits = len(a) == len(b) == 2 and a[0] == b[1] == rank and a[1] >= inputs and b[0] >= outputs
    return rank or None if fits and own == expected else None


def _vera(parts: Parts, shared: Parts, outputs: int, inputs: int) -> Pair:
    a, b = shared["vera_A"][:, :inputs], shared["vera_B"][:outputs]
    return scaled(a, parts["vera_lambda_d"]), scaled(b, parts["vera_lambda_b"])


def _names(*fields: str) -> Mapping[str, None]:
    return dict.fromkeys(fields)


_LYCORIS: Mapping[str, str | None] = {
    "alpha": "lora_alpha",
    **_names("init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale"),
    **_names("decompose_both", "decompose_factor", "use_effective_conv2d"),
}
_ADALORA: Mapping[str, str | None] = {
    "init_r": "r",
    **_names("r", "target_r", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    **_names("beta1", "beta2", "tinit", "tfinal", "deltaT", "total_step", "orth_reg_weight"),
}
_VERA = _names("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights")
_LOHA_PARTS = [f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"]
_LOKR_PARTS = [f"lokr_w{i}{side}" for i in (1, 2) for side in ("", "_a", "_b")]
METHODS: Mapping[str, Method] = {
    "ADALORA": Method(
        ("lora_A", "lora_B", "lora_E"), (), _ADALORA, _adalora_rank, _adalora, _adalora_scaling
    ),
    "LOHA": Method(_LOHA_PARTS, (), _LYCORIS, _loha_rank, _loha, _lycoris_scaling),
    "LOKR": Method(_LOKR_PARTS, (), _LYCORIS, _lokr_rank, _lokr, _lycoris_scaling),
    "VERA": Method(
        ("vera_lambda_b", "vera_lambda_d"), ("vera_A", "vera_B"), _VERA, _vera_rank, _vera, lambda *_: 1.0
    ),
}
"""``peft_type`` -> how it is folded."""


def _row_products(one: Tensor, two: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[r, n] and [s, m] -> [r * s, ...]: the products of each row of ``one`` with each of ``two``."""
    return torch.stack([product(x, y) for x in one for y in two])


def scaled(matrix: Tensor, factors: Tensor) -> Tensor:
    """Multiply each row by its factor."""
    return matrix * factors[:, None]
