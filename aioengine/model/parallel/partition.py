"""The part of each matrix that a rank holds: Megatron's partition, Shoeybi et al., 2019, arXiv:1909.08053.

Linears that begin a block (q, k, v, gate, up) and lm_head are split over their outputs, those that end one
(o, down) and the embedding over their inputs: between them no communication is needed. Each expert is split
like an MLP. Routers and the gates of shared experts are whole on every rank. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.packing import Packing
from aioengine.model.parallel.group import Ranges, Shard
from aioengine.model.spec import GATE_UP, QKV, ModelSpec

_SPLIT_INPUTS = frozenset({"o_proj", "down_proj", "embed_tokens"})

_LINEARS_OF = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}
"""The linears that are below each other in one matrix."""

_MAX_SIZE = 64


class Partition:
    """The share of one rank.

    Raises :class:`ConfigError`, with the number and the sizes that work, if the model does not divide.
    """

    def __init__(self, spec: ModelSpec, shard: Shard) -> None:
        if reason := _obstacle(spec, shard):
            works = [n for n in range(1, _MAX_SIZE + 1) if not _obstacle(spec, shard._replace(size=n))]
            raise ConfigError(
                f"tensor_parallel_size={shard.size}: {reason}; sizes that work for this model: "
                f"{', '.join(map(str, works))}"
            )
        self.whole = spec
        self.shard = shard
        size = shard.size
        self.local = msgspec.structs.replace(
            spec,
            num_heads=spec.num_heads // size,
            num_kv_heads=max(spec.num_kv_heads // size, 1),
            intermediate_size=spec.intermediate_size // size,
            vocab_size=-(-spec.vocab_size // size),
            **_expert_sizes(spec, size),
        )
        """The model as a rank allocates it. A vocabulary that does not divide is padded; quantized weights
        are expanded where a rank's inputs are no whole blocks."""
        if size > 1:
            packed = {name: packing for name, packing in spec.packed.items() if self._keeps(name, packing)}
            self.local = msgspec.structs.replace(self.local, packed=packed)

    def _keeps(self, name: str, packing: Packing) -> bool:
        place = self.whole.find_module(name)
        if place is None or (module := place[1]) == "embed_tokens":
            return True  # an embedding is split over its rows
        part = self.inputs(module)
        return packing.divides(part.start, part.stop, self.whole.linear(module).in_features)

    def is_whole(self, module: str) -> bool:
        """Return whether every rank has all of a module, and computes all of its outputs."""
        return module in self.whole.plain_modules

    def splits_inputs(self, module: str) -> bool:
        """Return whether every rank has all outputs of a module, as a summand, for a part of the inputs."""
        kind = module.rpartition(".")[2]
        return kind in _SPLIT_INPUTS or (
            isinstance(self.whole, MixtureSpec) and kind == self.whole.names.down
        )

    def adds_up_adapted(self, module: str) -> bool:
        """Return whether the ranks' outputs are added up only after they have been scaled and shifted.

        The outputs of experts are: they are added up for a whole layer at once.
        """
        return "." in module and self.shard.size > 1 and self.splits_inputs(module)

    def outputs(self, module: str) -> Ranges:
        """Return the outputs of which the rank has the whole rows; all of those whose inputs are split.

        Of a matrix with several linears, it has its heads, or its part, of each.
        """
        if self.splits_inputs(module):
            return (slice(0, self.whole.linear(module).out_features),)
        found, begin = [], 0
        for member in _LINEARS_OF.get(module, (module,)):
            part = self._range(member, self.local.linear(member).out_features)
            found.append(slice(begin + part.start, begin + part.stop))
            begin += self.whole.linear(member).out_features
        return tuple(found)

    def inputs(self, module: str) -> slice:
        """Return the inputs that the rank has."""
        if not self.splits_inputs(module):
            return slice(0, self.whole.linear(module).in_features)
        return self._range(module, self.local.linear(module).in_features)

    @property
    def vocabulary(self) -> slice:
        """The tokens whose embeddings and logits the rank has."""
        return self.inputs("embed_tokens")

    def parameter(self, name: str, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[Ranges, ...]]:
        """Return the shape of a checkpoint's parameter and the part that the rank takes, for each dimension,
        by its Hugging Face name.

        ``shape`` is what the rank allocates for it.
        """
        path, _, kind = name.rpartition(".")
        if kind == "sinks":
            width = self.local.num_heads
            return (self.whole.num_heads,), (
                (slice(self.shard.rank * width, (self.shard.rank + 1) * width),),
            )
        place = self.whole.find_module(path)
        if place is None or kind not in ("weight", "bias"):
            return tuple(shape), tuple((slice(0, n),) for n in shape)
        module = place[1]
        n_in, n_out = self.whole.linear(module)
        outputs, inputs = self.outputs(module), (self.inputs(module),)
        if kind == "bias":
            return (n_out,), (outputs,)
        if module == "embed_tokens":  # [vocabulary, hidden]: a linear over one-hot tokens, transposed
            return (n_in, n_out), (inputs, outputs)
        return (n_out, n_in), (outputs, inputs)

    def _range(self, module: str, width: int) -> slice:
        rank, whole = self.shard.rank, self.whole
        if self.is_whole(module):
            return slice(0, width)
        if module in ("k_proj", "v_proj"):  # with fewer heads than ranks, several have the same one
            rank = rank * min(whole.num_kv_heads, self.shard.size) // self.shard.size
        end = whole.vocab_size if module in ("embed_tokens", "lm_head") else (rank + 1) * width
        return slice(rank * width, min((rank + 1) * width, end))


def _expert_sizes(spec: ModelSpec, size: int) -> dict[str, int]:
    """Return the sizes of a rank's experts, by the fields of :class:`MixtureSpec`."""
    if not isinstance(spec, MixtureSpec):
        return {}
    return {"expert_size": spec.expert_size // size, "shared_size": spec.shared_size // size}


def _obstacle(spec: ModelSpec, shard: Shard) -> str | None:
    size = shard.size
    if size > 1 and spec.qk_norm and spec.qk_norm_whole:
        return "queries and keys are normed over all heads together"
    sizes = [(count, f"as the {what}") for what, count in spec.mlp_sizes.items()]
    for count, what in ((spec.num_heads, "attention heads"), *sizes):
        if count % size:
            return f"{count} {what} cannot be split evenly"
    kv_heads = spec.num_kv_heads
    if kv_heads % size and size % kv_heads:
        return f"{kv_heads} KV heads can neither be split nor repeated evenly"
    if shard.fully_sharded and spec.hidden_size % size:
        return f"fully_sharded_loras splits the hidden size, and {spec.hidden_size} cannot be split evenly"
    if (size - 1) * -(-spec.vocab_size // size) >= spec.vocab_size:
        return f"a vocabulary of {spec.vocab_size} leaves ranks with nothing"
    return None
