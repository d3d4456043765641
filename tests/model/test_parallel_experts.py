"""Experts on several ranks: the tokens of one rank, what ranks hold, and what they send."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.any_models import config_of
from support.moe_adapters import PARAMETERS, MoeModel
from support.parallel_ranks import Phase, Ranks, Script, hold, play, times_held, traffic
from support.selection import mostly_slow_rows
from support.served_models import prompt

from aioengine import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.executors.parts import plan_parts
from aioengine.kernels import available_backends
from aioengine.model.files.resolve import read_spec
from aioengine.model.parallel.group import Shard, SoloGroup
from aioengine.model.parallel.partition import Partition
from aioengine.model.slots.layout import SlotLayout

pytestmark = [
    pytest.mark.usefixtures("preloaded_workers"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
BY_THREE = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "head_dim": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"sliding_window": 9, "intermediate_size": 64}),
    "qwen2_moe": (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 64} | {"intermediate_size": 64},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"norm_topk_prob": True, "num_experts": 20, "intermediate_size": 64},
    ),
    "gpt_oss": ("gpt_oss", {"sliding_window": 9, "swiglu_limit": 1.5, "intermediate_size": 64}),
    "one-expert": ("mixtral", {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 32}),
    "gpt_oss-by-three": ("gpt_oss", {**BY_THREE, "intermediate_size": 48}),
    "qwen2_moe-by-three": ("qwen2_moe", {**BY_THREE, "moe_intermediate_size": 24}),
}
BY_TWO = [case for case in CASES if "three" not in case]


@functools.cache
def model_of(root: Path, case: str) -> MoeModel:
    """A model with an adapter of each form."""
    family, fields = CASES[case]
    model = MoeModel(root / case, family, **fields)
    model.add_by_peft("all-linear", 2, target_modules="all-linear")
    model.add_by_peft("parameters", 3, target_modules=["v_proj"], target_parameters=PARAMETERS)
    model.add_by_peft(
        "router", 5, target_modules=["k_proj"], target_parameters=[f"mlp.{model.router}.weight"]
    )
    model.add_by_module("modules", 6, (0, 1, 2))
    model.add_by_module("dora", 8, (0, 1, 2), dora=True)
    return model


def script_of(model: MoeModel, kernels: str) -> Script:
    """All adapters, base rows beside them; slots are rewritten while others run."""
    folders = model.adapters
    first = {0: folders["all-linear"], 1: folders["dora"], 2: folders["modules"]}
    prompts = [(prompt(1, 20), -1), (prompt(2, 7), 0), (prompt(3, 25), 1), (prompt(4, 9), 2)]
    phases = [
        Phase(first, prompts),
        Phase({2: folders["parameters"], 0: folders["router"]}, [(prompt(5, 4), 2), (prompt(6, 12), 0)]),
    ]
    modules = read_spec(model.folder, "native").targets(None)
    return Script(model.folder, phases, max_loras=3, max_rank=8, kernels=kernels, target_modules=modules)


@functools.cache
def alone(root: Path, case: str) -> Any:
    """``test_experts.py`` compares it with transformers and peft."""
    return play(SoloGroup(), script_of(model_of(root, case), "torch"))


def check(ranks: Ranks, root: Path, case: str, fully_sharded: bool, kernels: str) -> None:
    expected = alone(root, case)
    script = script_of(model_of(root, case), kernels)
    found, *others = ranks.run(play, script, fully_sharded=fully_sharded)
    assert {outcome.compiled for outcome in (found, *others)} == {kernels == "cpu"}
    assert found.outputs == expected.outputs
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("case", "kernels", "fully_sharded"),
    mostly_slow_rows(
        [
            *((case, "cpu", i % 2 == 1) for i, case in enumerate(BY_TWO)),
            *(("qwen2_moe", "torch", False), ("gpt_oss", "torch", True)),
        ],
        ("qwen2_moe", "cpu", True),
    ),
)
@pytest.mark.slow
def test_two_ranks_give_the_tokens_and_logits_of_one(
    two: Ranks, root: Path, case: str, kernels: str, fully_sharded: bool
) -> None:
    if kernels not in available_backends("cpu"):
        pytest.skip("the CPU library cannot be built here")
    check(two, root, case, fully_sharded, kernels)


@pytest.mark.parametrize(
    ("case", "fully_sharded"), [("gpt_oss-by-three", False), ("qwen2_moe-by-three", True)]
)
@pytest.mark.slow
def test_three_ranks_give_the_tokens_and_logits_of_one(
    three: Ranks, root: Path, case: str, fully_sharded: bool
) -> None:
    check(three, root, case, fully_sharded, "torch")


@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize("case", ["qwen2_moe", "gpt_oss"])
def test_the_plan_is_what_each_rank_allocates(two: Ranks, root: Path, case: str, fully_sharded: bool) -> None:
    model = model_of(root, case)
    lora = LoRAConfig(max_loras=3, max_lora_rank=8, fully_sharded_loras=fully_sharded)
    config = EngineConfig(
        model=str(model.folder), executor="process", tensor_parallel_size=2, lora=lora, dtype="float32",
        device="cpu", max_model_len=64, kv_cache_memory="1MiB",
    )  # fmt: skip
    plan = plan_parts(config, available_bytes=10**9).memory
    script = script_of(model, "torch")
    for share in two.run(hold, script, model.adapters["dora"], fully_sharded=fully_sharded):
        assert share.weight_bytes == plan.bytes_of("base weights")
        assert share.slot_bytes == plan.bytes_of("slot pool")
        assert share.image_bytes <= plan.slot_bytes


def test_experts_send_what_an_mlp_sends(two: Ranks, root: Path) -> None:
    """One sum a layer, however many experts a token goes through; fully sharded, A's outputs as well."""
    model = model_of(root, "qwen2_moe")
    layers, hidden, tokens, routed, rank = 2, 64, 27, 54, 8
    script = script_of(model, "torch")
    modules = Phase({0: model.adapters["modules"]}, [(prompt(1, 20), -1), (prompt(2, 7), 0)])
    for fully_sharded in (False, True):
        found = two.run(traffic, script._replace(phases=[modules]), fully_sharded=fully_sharded)
        assert found[0] == found[1]
        all_reduces, _, nbytes, _ = found[0]
        base = 4 * (tokens * hidden * (1 + 2 * layers) + 2 * 128 // 2)
        if not fully_sharded:
            assert (all_reduces, nbytes) == (1 + 2 * layers, base)
            continue
        # From the first of the rows with an adapter on: of experts, up to all that there are.
        assert base < nbytes <= base + 4 * rank * layers * (3 * 7 + 4 * 7 + (1 + 1) * 7 + 2 * routed)


def test_a_share_covers_every_matrix_once_but_what_is_whole(tmp_path: Path) -> None:
    config_of("qwen2_moe", shared_expert_intermediate_size=24).save_pretrained(tmp_path)
    spec = read_spec(tmp_path, "native")
    for fully_sharded in (False, True):
        layouts = [SlotLayout(spec, 16, spec.layer_modules, Shard(r, 2, fully_sharded)) for r in (0, 1)]
        for module in spec.layer_modules:
            weight, a, b = times_held(layouts, module)
            whole = module in ("gate", "shared_expert_gate")
            ends_block = module.endswith(("o_proj", "down_proj"))
            assert (weight == 1 + whole).all()
            assert (a == (2 if whole or not (ends_block or fully_sharded) else 1)).all()
            assert (b == (2 if whole or (ends_block and not fully_sharded) else 1)).all()


def test_experts_that_do_not_divide_are_refused_with_the_sizes_that_do(tmp_path: Path) -> None:
    shared = "shared_expert_intermediate_size"
    for family, fields, size, words in (
        ("qwen3_moe", {"moe_intermediate_size": 22}, 4, "22 as the intermediate size of an exp.*: 1, 2$"),
        ("qwen2_moe", {shared: 22}, 4, "22 as the intermediate size of the shared expert.*: 1, 2$"),
        ("mixtral", {}, 3, "4 attention heads.*: 1, 2, 4$"),
        ("olmoe", {}, 2, "normed over all heads together; sizes that work for this model: 1$"),
    ):  # fmt: skip
        config_of(family, **fields).save_pretrained(tmp_path)
        with pytest.raises(ConfigError, match=words):
            Partition(read_spec(tmp_path, "native"), Shard(0, size))
    config_of("qwen3_moe", intermediate_size=23).save_pretrained(tmp_path)
    Partition(read_spec(tmp_path, "native"), Shard(0, 4))  # no layer has an MLP of that size
