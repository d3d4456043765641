"""What each rank keeps of an adapter: its share; and all of them everything."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from support.peft_files import SPEC, WEIGHTS, edit_config, edit_weights, make, read
from support.peft_methods import FOLDED, save
from support.selection import mostly_slow
from torch import Tensor

from aioengine.adapters.peft.pack import PackedAdapter
from aioengine.adapters.peft.read import KnownPlans
from aioengine.errors import AdapterError, AdapterInvalid
from aioengine.model.parallel.group import Shard, take
from aioengine.model.slots.image import build_image
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import LORA_MODULES, TARGETABLE_MODULES

NO_BASE = {"save_embedding_layers": False}
CASES: dict[str, dict[str, Any]] = {
    "all": {"target_modules": list(LORA_MODULES)},
    "ranks": {"target_modules": list(LORA_MODULES), "rank_pattern": {"q_proj": 9, "up_proj": 1}},
    "another dtype": {"target_modules": ["k_proj", "down_proj"], "dtype": torch.bfloat16},
    "dora": {"target_modules": list(LORA_MODULES), "use_dora": True, "r": 5},
    "bias": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "outer": {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "save": NO_BASE},
}
MODES = [(2, False), (2, True), (4, False), (4, True)]


@functools.cache
def slot_of(rank: int, size: int, fully_sharded: bool) -> SlotLayout:
    return SlotLayout(SPEC, 16, TARGETABLE_MODULES, Shard(rank, size, fully_sharded))


def read_share(folder: Path, slot: SlotLayout, **options: Any) -> PackedAdapter:
    return read(folder, target_modules=TARGETABLE_MODULES, slot=slot, **options)


@pytest.mark.parametrize(("size", "fully_sharded"), MODES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_a_share_is_the_part_of_the_whole_that_the_slot_holds(
    case: str, size: int, fully_sharded: bool, tmp_path: Path
) -> None:
    make(tmp_path, **CASES[case])
    whole = read(tmp_path, target_modules=TARGETABLE_MODULES)
    for rank in range(size):
        slot = slot_of(rank, size, fully_sharded)
        known: KnownPlans = {}
        shares = [read_share(tmp_path, slot, known=known) for _ in range(2)]  # and with a known header
        for packed in shares:
            check_share(packed, whole, slot)
        images = [build_image(slot, packed, {}, torch.float32) for packed in shares]
        assert torch.equal(images[0].data, images[1].data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_a_folded_adapter_is_shared_too(tmp_path: Path, fully_sharded: bool) -> None:
    save(tmp_path, "LOHA", **FOLDED["LOHA"])
    whole = read(tmp_path, target_modules=TARGETABLE_MODULES)
    for rank in range(2):
        slot = slot_of(rank, 2, fully_sharded)
        check_share(read_share(tmp_path, slot), whole, slot)


def check_share(packed: PackedAdapter, whole: PackedAdapter, layout: SlotLayout) -> None:
    assert packed.rank == whole.rank
    assert packed.digest == (whole.digest if layout.shard.rank == 0 else "")
    assert packed.tensors.keys() == whole.tensors.keys()
    for key, (a, b) in whole.tensors.items():
        share = layout.share(key[1])
        equal(packed.tensors[key], (a[share.a], take(b, share.b)))
    for ours, theirs in ((packed.magnitudes, whole.magnitudes), (packed.biases, whole.biases)):
        assert ours.keys() == theirs.keys()
        for key, values in theirs.items():
            equal(ours[key], take(values, layout.share(key[1]).outputs))
    for key in whole.magnitudes:  # its norms are of what the rank computes, or of all of it for its inputs
        a, b = whole.tensors[key]
        outputs, inputs = layout.partition.outputs(key[1]), layout.partition.inputs(key[1])
        equal(packed.computed[key], (a[:, inputs], take(b, outputs)))


def equal(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("size", "fully_sharded"), MODES)
@pytest.mark.parametrize("case", mostly_slow(["all", "dora", "bias", "outer"], "dora"))
@pytest.mark.slow
def test_a_bad_value_is_found_wherever_it_is_as_by_one_rank(
    case: str, size: int, fully_sharded: bool, tmp_path: Path
) -> None:
    make(tmp_path, **CASES[case])
    tensors = load_file(tmp_path / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if "layers.1" in key or "layers" not in key]:
        where = int(torch.randint(tensors[key].numel(), (1,), generator=generator))

        def spoil(tensors: dict[str, Tensor], key: str = key, where: int = where) -> None:
            tensors[key].view(-1)[where] = torch.nan

        good = (tmp_path / WEIGHTS).read_bytes()
        edit_weights(tmp_path, spoil)
        with pytest.raises(AdapterInvalid) as alone:
            read(tmp_path, target_modules=TARGETABLE_MODULES)
        found = set()
        for rank in range(size):
            try:
                read_share(tmp_path, slot_of(rank, size, fully_sharded))
            except AdapterError as error:
                found.add(str(error))
        assert found == {str(alone.value)}
        (tmp_path / WEIGHTS).write_bytes(good)


def test_tied_adapters_are_compared_though_their_shares_are_not_alike(tmp_path: Path) -> None:
    options = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "save": NO_BASE}
    make(tmp_path, tie=True, **options)
    spec = msgspec.structs.replace(SPEC, tie_embeddings=True)
    slots = [SlotLayout(spec, 16, TARGETABLE_MODULES, Shard(rank, 2, True)) for rank in (0, 1)]
    whole = read(tmp_path, spec, target_modules=TARGETABLE_MODULES)
    assert (-1, "lm_head") in whole.tensors
    for slot in slots:
        check_share(read(tmp_path, spec, target_modules=TARGETABLE_MODULES, slot=slot), whole, slot)

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if "lm_head" in key and key.endswith("A.weight"))
        tensors[key][0, 0] += 1  # of row 0 of A, which rank 0 holds, for input 0, whose B rank 0 holds

    edit_weights(tmp_path, change)
    for slot in slots:
        with pytest.raises(AdapterInvalid, match="weights differ"):
            read(tmp_path, spec, target_modules=TARGETABLE_MODULES, slot=slot)


def test_only_the_first_rank_knows_the_digest_and_all_know_the_version(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"], r=16)
    whole = read(tmp_path)
    first, second = (read_share(tmp_path, slot_of(rank, 2, True)) for rank in range(2))
    assert (first.digest, second.digest) == (whole.digest, "")
    assert first.version == second.version == whole.version
    os.utime(tmp_path / WEIGHTS, ns=(1, 1))
    assert read_share(tmp_path, slot_of(1, 2, True)).version != whole.version
    edit_config(tmp_path, inference_mode=False)
    assert read_share(tmp_path, slot_of(0, 2, True)).digest != whole.digest
