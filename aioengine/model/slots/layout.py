"""Layout of an adapter slot, which planning, loading and the slot pool share. No torch here.

An adapter in a slot is one row of elements, without gaps: first the LoRA matrices of the modules that it
targets, each as large as its own rank; the As of a fused linear adjoin. Then comes what DoRA and
``lora_bias`` need, for every output of the modules that have it, and then the rows of trained tokens:
:func:`aioengine.model.slots.image.image_shape` has the offsets.

Where a slot holds int8, its elements are bytes, and the scales follow the As; everything begins at a multiple
of ``INT8_UNIT`` bytes, so there may be gaps.

Under tensor parallelism a slot holds a rank's share, in one of two ways. By default one matrix of each pair
is split, as the base linear is: B over the outputs, or A over the inputs. Fully sharded, the other one is as
well: A over the adapter's rank, or B over the outputs (S-LoRA, Sheng et al., 2023,
https://arxiv.org/abs/2311.03285, section 5). A process then has every ``size``-th row of A, so that any
adapter is spread evenly. Adapters on what every rank has as a whole, such as routers, are whole, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from aioengine.model.parallel.group import SOLO, Ranges, Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.spec import NO_LAYER, LinearShape, ModelSpec

INT8_UNIT = 16
"""Bytes."""
_SCALE_BYTES = 4
MAX_RANK = 512
"""The largest rank of any adapter. One that is made of others may have it, whatever the slots have room for:
it takes as many slots as it needs."""


class Elements(NamedTuple):
    """The elements of a slot: of the model's dtype all of them, or, where the matrices are int8, bytes."""

    int8: bool = False
    affine: int = 1
    """Elements of each gain and shift."""

    def matrix(self, numbers: int) -> int:
        """Elements that a matrix takes."""
        return -(-numbers // INT8_UNIT) * INT8_UNIT if self.int8 else numbers

    def scales(self, rank: int) -> int:
        """Elements that the scales of ``rank`` rows take."""
        return self.matrix(rank * _SCALE_BYTES) if self.int8 else 0

    def values(self, numbers: int) -> int:
        """Elements that numbers take which are never int8."""
        return self.matrix(numbers * self.affine)


FLOATS = Elements()


class Place(NamedTuple):
    """One module of one layer."""

    shape: LinearShape
    """The inputs that A has and the outputs that B has."""
    a_rank: int
    """The rows that A has room for."""
    b_rank: int
    """The columns that B has room for."""
    num_outputs: int
    """The outputs that gain and shift are for; see :meth:`aioengine.kernels.Backend.lora_affine`."""

    def elements(self, of: Elements) -> int:
        """Count the elements of A and B."""
        a, b = self.a_rank * self.shape.in_features, self.shape.out_features * self.b_rank
        return of.matrix(a) + of.scales(self.a_rank) + of.matrix(b)


class Share(NamedTuple):
    """The parts of an adapter's matrices that a rank has. All matrices of a module are cut alike."""

    a: tuple[slice, slice]
    """Part of A [r, in] that the rank holds."""
    b: Ranges
    """Rows of B that the rank holds."""
    outputs: Ranges
    """Part of the values with one entry for each output (magnitudes, biases, gain, shift) that the rank
    holds."""


class FusedPlace(NamedTuple):
    """One linear of the decoder, or an embedding, with the modules that slots hold for it."""

    layer: int
    name: str
    modules: tuple[str, ...]
    columns: tuple[int, ...]
    """The first output column of each module."""
    b_columns: tuple[int, ...]
    """The first output column that each module's B adds to."""


class SlotLayout:
    """The layout of a slot for ``modules`` (by :meth:`ModelSpec.targets`), each with room for ``max_rank``,
    and with room for ``max_tokens`` trained tokens.

    Raises :class:`ConfigError` for a module that cannot be targeted, and as :class:`Partition`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        max_rank: int,
        modules: Iterable[str],
        shard: Shard = SOLO,
        holds: Elements = FLOATS,
        max_tokens: int = 0,
    ) -> None:
        self.spec = spec
        self.max_tokens = max_tokens
        self.holds = holds
        self.max_rank = max_rank
        self.modules = spec.targets(tuple(modules))
        self.partition = Partition(spec, shard)
        self.shard = shard
        self._shapes = {module: self._shape(module) for module in self.modules}
        self._shares = {module: self.share(module) for module in self.modules}
        self.fused = tuple(self._fused_places())
        self.places = {
            (fused.layer, module): self._shapes[module] for fused in self.fused for module in fused.modules
        }
        self.affine_elements = sum(holds.values(2 * place.num_outputs) for place in self.places.values())
        """One slot's elements for DoRA and biases: two for every output of every module."""
        self.token_elements = holds.values(max_tokens * spec.hidden_size)
        """One slot's elements for ``max_tokens`` rows."""
        matrices = sum(self.matrix_elements_by_module.values())
        self.elements = matrices + self.affine_elements + self.token_elements
        """Elements of a slot that has room for ``max_rank`` everywhere."""
        self.index = {key: index for index, key in enumerate(self.places)}
        """Number of each place; those of a fused linear follow each other."""

    def _shape(self, module: str) -> Place:
        size, (n_in, n_out) = self.shard.size, self.partition.local.linear(module)
        if not self.shard.fully_sharded or self.partition.is_whole(module):
            return Place(LinearShape(n_in, n_out), self.max_rank, self.max_rank, n_out)
        if self.partition.splits_inputs(module):
            return Place(LinearShape(n_in, n_out // size), self.max_rank, self.max_rank, n_out)
        share = -(-self.max_rank // size)
        return Place(LinearShape(n_in, n_out), share, share * size, n_out)

    def share(self, module: str) -> Share:
        """Return the part of an adapter's matrices for ``module`` that the slot holds."""
        rank, size, full = self.shard
        inputs, outputs = self.partition.inputs(module), self.partition.outputs(module)
        if not full or self.partition.is_whole(module):
            return Share((slice(None), inputs), outputs, outputs)
        if self.partition.splits_inputs(module):
            width = self._shapes[module].shape.out_features
            return Share((slice(None), inputs), (slice(rank * width, (rank + 1) * width),), outputs)
        return Share((slice(rank, None, size), inputs), outputs, outputs)

    def _fused_places(self) -> Iterable[FusedPlace]:
        local, targeted = self.partition.local, set(self.modules)
        for layer in (NO_LAYER, *range(self.spec.num_layers)):
            for name, members in self.spec.fused(layer).items():
                columns, column = {}, 0
                for module in members:
                    columns[module] = column
                    column += local.linear(module).out_features
                held = tuple(m for m in members if m in targeted)
                if held:
                    begins = tuple(columns[m] for m in held)
                    b_begins = tuple(columns[m] + self._first_of_b(m) for m in held)
                    yield FusedPlace(layer, name, held, begins, b_begins)

    def _first_of_b(self, module: str) -> int:
        """Return B's first output, counted from the first that the rank has."""
        share = self._shares[module]
        return int(share.b[0].start - share.outputs[0].start)

    @property
    def matrix_elements_by_module(self) -> dict[str, int]:
        """One slot's A and B elements by kind of module: layers x max_rank x (in + out), unless it is a share
        or int8."""
        found: dict[str, int] = {}
        for module in self.modules:
            kind = self.spec.kind_of(module)
            elements = self.spec.layers_with(module) * self._shapes[module].elements(self.holds)
            found[kind] = found.get(kind, 0) + elements
        return found
