"""The sizes that a core is built with."""

from __future__ import annotations

from typing import Literal, NamedTuple


class CoreLimits(NamedTuple):
    """The sizes that a core is built with."""

    num_slots: int
    cpu_capacity: int
    max_loads: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_caching: bool = True
    max_waiting: int | None = None
    max_waiting_per_tenant: int | None = None
    max_waiting_tokens: int | None = None
    max_waiting_tokens_per_tenant: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    seed: int = 0
    policy_time_budget: float = 0.02
    policy_max_overruns: int = 20
    cpu_max_bytes: int | None = None
    slot_memory: int | None = None
    """Bytes that the slots share; None: each has ``slot_bytes``."""
    slot_bytes: int = 1 << 30
    """Bytes of a slot of one size; an adapter with more takes several."""
    max_step_seconds: float | None = None
    """None: steps may take any time."""
    pair_tokens: float = 1e-4
    """First guess of the cost of a pair of a query and a key, in tokens."""
    speculation: Literal["none", "ngram"] = "none"
    draft_constrained: bool = True
    """Whether tokens are proposed to requests with a constraint, too."""
