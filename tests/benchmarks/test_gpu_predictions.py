"""docs/gpu-predictions.md is what its script writes, and what it says of launches and kernels is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
from support.fake_gpu import run_on_fake_gpu

from aioengine.kernels.triton import aot
from benchmarks.kernels import predictions
from benchmarks.kernels.predictions import GPUS, LLAMA_8B, Kernel, Step

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "gpu-predictions.md").read_text(encoding="utf-8")
COMPILED = [line for line in PAGE.splitlines() if re.search(r"\| sm_(80|90) \|", line)]


def test_the_page_is_what_the_script_writes() -> None:
    said = re.search(r"Compiled by Triton (\S+):", PAGE)
    assert said is not None
    written = predictions.page(COMPILED).replace(f"Triton {triton.__version__}:", f"Triton {said[1]}:")
    assert written == PAGE
    wanted = {(name, f"sm_{capability}") for name in predictions.kernels() for capability in (80, 90)}
    assert {tuple(line.split(" | ")[:2]) for line in COMPILED} == {(f"| {a}", b) for a, b in wanted}


@pytest.mark.parametrize(("name", "capability"), [("expand, decode", 90), ("norm", 80)])
def test_its_kernels_are_the_compiled_ones(name: str, capability: int) -> None:
    row = predictions.compiled_row(name, predictions.kernels()[name], capability)
    if f"Compiled by Triton {triton.__version__}:" in PAGE:
        assert row in COMPILED
    else:  # another version of the compiler chooses other registers
        assert row.split(" | ")[:3] in [line.split(" | ")[:3] for line in COMPILED]


def test_the_launches_that_it_counts_are_taken() -> None:
    """Beside the kernels of a layer, its four products are cuBLAS's."""
    taken = run_on_fake_gpu("launches")
    for kind, adapters in (("decode, base", 0), ("decode, 8 adapters", 8)):
        assert len(list(predictions.layer(LLAMA_8B, Step(63, 100, adapters)))) == taken[kind][0] + 4


def test_a_kernel_is_bound_by_bytes_or_by_products() -> None:
    figures = GPUS["H100"].figures
    assert predictions.seconds(Kernel("norm", 0), figures) == predictions.LAUNCH
    moving = predictions.seconds(Kernel("qkv", 1e9), figures) - predictions.LAUNCH
    assert moving == pytest.approx(1e9 / (3.35e12 * figures.weights_achieved))
    multiplying = predictions.seconds(Kernel("qkv", 1e9, 1e15), figures) - predictions.LAUNCH
    assert multiplying == pytest.approx(1e15 / (989e12 * figures.linear_achieved))


def test_more_of_anything_takes_longer() -> None:
    step, gpu = Step(8, 1000, 2, 16), GPUS["A100"]
    before = predictions.step_seconds(gpu, step)
    for change in ({"batch": 9}, {"context": 1500}, {"adapters": 3}, {"rank": 32}):
        assert predictions.step_seconds(gpu, step._replace(**change)) > before
    assert predictions.prompt_seconds(gpu, 600) > predictions.prompt_seconds(gpu, 500)
    # The weights alone: 15 GB in bfloat16, without the embedding.
    assert predictions.step_seconds(gpu, Step(1, 1)) > 15e9 / gpu.figures.bandwidth


def test_a_quantized_product_moves_more_than_its_weight_expanded() -> None:
    gpu, shape = GPUS["H100"], (8, 1024, 2048)
    seconds = {format: predictions.quantized_seconds(gpu, format, *shape) for format in predictions.FORMATS}
    least = 1024 * 2048 * (4 + 4 + 2 + 2) / gpu.figures.bandwidth  # float32 written and read, then bfloat16
    assert all(each > least for each in seconds.values())


def test_occupancy_is_bound_by_what_runs_out_first() -> None:
    gpu = GPUS["H100"]
    assert predictions.occupancy(gpu, 32, 0, 4) == 1.0
    assert predictions.occupancy(gpu, 64, 0, 8) == 0.5  # registers: 4 blocks of 8 warps
    assert predictions.occupancy(gpu, 255, 0, 8) == 0.125
    assert predictions.occupancy(gpu, 32, 100 * 1024, 4) == 0.125  # shared memory: 2 blocks of 4 warps
    assert aot.FILE_REGISTERS == 65536


def test_measured_and_predicted_are_side_by_side() -> None:
    """The tables of a GPU, on one that computes nothing and takes a millisecond for everything."""
    tables = run_on_fake_gpu("predicted_tables", "NVIDIA H100 80GB HBM3")
    steps, products = tables
    spec = predictions.LLAMA_8B
    assert [row[:2] for row in steps] == [["1", "0"], ["1", "1"], ["8", "0"], ["8", "1"], ["8", "8"]]
    for batch, adapters, launched, played, _, predicted in steps:
        step = Step(int(batch), 100, int(adapters), 16)
        expected = predictions.step_seconds(GPUS["H100"], step, predictions.with_layers(spec, 1))
        assert (launched, played, predicted) == ("1.00", "1.00", f"{expected * 1e3:.2f}")
    assert [row[0] for row in products] == list(predictions.FORMATS)
    assert all(row[1] == "1.00" and float(row[2]) > 0.1 for row in products)
    assert predictions.gpu_of("NVIDIA GeForce RTX 4090") is None  # nothing is predicted for it
