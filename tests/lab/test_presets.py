from __future__ import annotations

from pathlib import Path

import pytest
from support.any_models import config_of

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.presets import available_presets, load_costs
from aioengine.lab.costs.roofline import DEVICES, estimate
from aioengine.lab.costs.steps import StepShape
from aioengine.memory_plan import plan_memory
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import SUPPORTED_ARCHITECTURES

H100_SXM = DEVICES["h100"]
LLAMA3_8B = load_costs("llama3-8b-h100").spec


def decode(rows: int, context: int, adapters: int = 0, rank: int = 16) -> StepShape:
    shares = tuple((rank, rows // adapters) for _ in range(adapters))
    return StepShape(rows, rows * context, 0, 0, rows, shares)


def prefill(tokens: int) -> StepShape:
    return StepShape(0, 0, tokens, tokens**2 // 2, 1)


def written(costs: CostModel, folder: Path) -> CostModel:
    """Return the cost model as it is after it was written and read."""
    costs.write(folder / "costs.json")
    return CostModel.read(folder / "costs.json")


def test_there_are_those_that_are_documented() -> None:
    assert {"llama3-8b-a10g", "llama3-8b-h100", "smollm2-135m-cpu"} <= set(available_presets())


@pytest.mark.parametrize("name", available_presets())
def test_presets_are_sound(name: str) -> None:
    costs = load_costs(name)
    assert costs.name == name
    assert costs.source
    assert costs.estimate == ("cpu" not in name)
    assert costs.estimate == bool(costs.fit is None)
    assert (
        costs.plan(EngineConfig(model=name, lora=LoRAConfig(max_loras=4, max_lora_rank=16))).num_blocks > 64
    )


def test_an_8b_model_has_the_sizes_that_are_published() -> None:
    costs = load_costs("llama3-8b-h100")
    assert costs.spec.num_parameters() == 8_030_261_248
    assert costs.adapter_nbytes(16) == 83_886_080  # 41.9e6 parameters in bfloat16
    assert costs.spec.kv_bytes_per_token(2) == 131_072


def test_a_mixture_reads_the_experts_that_its_tokens_choose() -> None:
    costs = load_costs("olmoe-1b-7b-h100")
    spec, expert = costs.spec, 3 * 2048 * 1024 * 16
    assert spec.num_parameters() == pytest.approx(6.92e9, rel=2e-3)
    assert load_costs("gemma3-4b-h100").spec.num_parameters() == pytest.approx(3.88e9, rel=2e-3)
    others = spec.num_parameters() - 64 * expert - spec.vocab_size * spec.hidden_size
    curve = dict(costs.steps.linears)
    for rows, share in ((1, 8 / 64), (8, 1 - (7 / 8) ** 8), (128, 1.0)):
        read = 2 * (others + share * 64 * expert) / (0.8 * H100_SXM.bandwidth)
        assert curve[rows] == pytest.approx(read, rel=1e-2)


@pytest.mark.parametrize("name", [name for name in available_presets() if "cpu" not in name])
def test_estimated_presets_are_what_the_figures_give(name: str) -> None:
    costs = load_costs(name)
    device = DEVICES[name.rpartition("-")[2]]
    assert estimate(name, costs.spec, device, sources={"model": costs.sources["model"]}) == costs


@pytest.mark.parametrize("family", SUPPORTED_ARCHITECTURES.values())
def test_any_native_model_has_an_estimate(family: str, tmp_path: Path) -> None:
    """With the sizes of its configuration, also after a cost model has been written and read."""
    config_of(family, torch_dtype="bfloat16").save_pretrained(tmp_path)
    costs = load_costs(f"{tmp_path}@h100")
    assert costs.estimate and costs.name == f"{tmp_path}@h100"
    assert written(costs, tmp_path) == costs
    spec = read_spec(tmp_path, "native")
    assert costs.spec.num_parameters() == spec.num_parameters()
    config = EngineConfig(model="any", dtype="bfloat16", lora=LoRAConfig(max_loras=2, max_lora_rank=8))
    plan = plan_memory(spec, config, device="cuda", available_bytes=costs.device_memory)
    assert costs.plan(config) == plan
    assert 0 < costs.step_seconds(decode(1, 20)) < costs.step_seconds(decode(4, 20, 2))


def test_several_gpus_share_each_layer_and_sum_their_results(tmp_path: Path) -> None:
    link, layers, hidden = 0.8 * 450e9, LLAMA3_8B.num_layers, LLAMA3_8B.hidden_size
    one, two, four = (estimate(f"x{n}", LLAMA3_8B, H100_SXM, n) for n in (1, 2, 4))
    assert one.steps == load_costs("llama3-8b-h100").steps
    for count, costs in ((2, two), (4, four)):
        assert costs.tensor_parallel_size == count
        reduces = 2 * layers + 1
        assert costs.steps.step == pytest.approx(one.steps.step + reduces * 1e-5, rel=1e-3)
        ring = 2 * (count - 1) / count * reduces * hidden * 2 / link
        least = (costs.spec.num_parameters() - 128256 * hidden) * 2 / count / (0.8 * H100_SXM.bandwidth)
        assert costs.steps.linears[0] == (1.0, pytest.approx(least + ring, rel=1e-2))
        assert costs.steps.decode_kv == pytest.approx(one.steps.decode_kv / count, rel=1e-3)
        assert one.adapter_nbytes(16) / count < costs.adapter_nbytes(16) < one.adapter_nbytes(16)
    assert four.step_seconds(decode(8, 4000)) < two.step_seconds(decode(8, 4000))
    assert two.step_seconds(decode(8, 4000)) < one.step_seconds(decode(8, 4000))
    config = EngineConfig(model="any", lora=LoRAConfig(max_loras=4, max_lora_rank=16))
    plan = four.plan(config)
    assert plan.num_ranks == 4
    assert plan.bytes_of("base weights") < 0.3 * one.plan(config).bytes_of("base weights")
    assert written(four, tmp_path) == four


def test_estimates_that_there_are_not(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no published figures of 'h1'; there are those of h100, a10g, "):
        load_costs(f"{tmp_path}@h1")
    assert load_costs(f"{tmp_path}@a10gx2").tensor_parallel_size == 2
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=7: .* sizes that work for this model: 1, 2"):
        load_costs(f"{tmp_path}@h100x7")
    load_costs(f"{tmp_path}@a10g").write(tmp_path / "costs.json")
    costs = (tmp_path / "costs.json").read_text()
    for field, words in (('"sink": 1', "unknown field 'sink'"), ('"sinks": 1', "model: .*bool")):
        (tmp_path / "costs.json").write_text(costs.replace('"model": {', f'"model": {{{field},'))
        with pytest.raises(ConfigError, match=words):
            CostModel.read(tmp_path / "costs.json")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama3-8b-h100'"):
        load_costs("llama3-8b-h1000")
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.json"):
        load_costs("nowhere.json")
