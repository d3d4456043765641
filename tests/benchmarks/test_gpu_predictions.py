"""docs/gpu-predictions.md is what its script writes, and what it says of launches and kernels is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import triton
from benchmarks.kernels.predictions import GPUS, LLAMA_8B, Kernel, Step
from support.fake_gpu import run_on_fake_gpu

from aioengine.kernels.triton import aot, targets
from benchmarks.kernels import predictions

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "gpu-predictions.md").read_text(encoding="utf-8")
COMPILED = [line for line in PAGE.splitlines() if re.search(r"\| sm_(80|90) \|", line)]


def test_the_page_is_what_the_script_writes() -> None:
    said = re.search(r"Compiled by Triton (\S+):", PAGE)
    assert said is not None
    written = predictions.page(COMPILED).replace(f"Triton {triton.__version__}:", f"Triton {said[1]}:")
    assert written == PAGE
    every = predictions.kernels().items()
    wanted = {(name, f"sm_{c}") for name, variant in every for c in (80, 90) if aot.compiles(variant, c)}
    assert {tuple(line.split(" | ")[:2]) for line in COMPILED} == {(f"| {a}", b) for a, b in wanted}


@pytest.mark.parametrize(("name", "capability"), [("expand, decode", 90), ("norm", 80)])
def test_its_kernels_are_the_compiled_ones(name: str, capability: int) -> None:
    row = predictions.compiled_row(name, predictions.kernels()[name], capability)
    if f"Compiled by Triton {triton.__version__}:" in PAGE:
        assert row in COMPILED
    else:  # another version of the compiler chooses other registers
        assert row.split(" | ")[:3] in [line.split(" | ")[:3] for line in COMPILED]


@pytest.mark.slow
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


def test_a_quantized_product_reads_what_is_stored() -> None:
    plain = predictions.product("plain", 1, 4096, 1024).nbytes
    forms = {form.name: form for form in predictions.FORMS}

    def launches(name: str, rows: int, capability: int = 90) -> list[Kernel]:
        return predictions.quantized_product(forms[name], rows, 4096, 1024, capability)

    found = {name: sum(kernel.nbytes for kernel in launches(name, 1)) for name in forms}
    assert 0.25 < found["int4"] / plain < 0.27 and 0.5 < found["int8"] / plain < 0.52
    assert found["fp8"] == found["int8"] == found["fp8, W8A8"] > found["fp8 at load, W8A8"]
    assert launches("fp8, W8A8", 64, 80) == launches("fp8", 64), "an A100 has no products of float8"
    rounding, narrow = launches("int8 at load, W8A8", 64, 80)
    assert narrow.flops == launches("int8", 64)[0].flops / 2
    assert rounding.nbytes == 3 * 64 * 4096


def test_occupancy_is_bound_by_what_runs_out_first() -> None:
    gpu = GPUS["H100"]
    assert predictions.occupancy(gpu, 32, 0, 4) == 1.0
    assert predictions.occupancy(gpu, 64, 0, 8) == 0.5  # registers: 4 blocks of 8 warps
    assert predictions.occupancy(gpu, 255, 0, 8) == 0.125
    assert predictions.occupancy(gpu, 32, 100 * 1024, 4) == 0.125  # shared memory: 2 blocks of 4 warps
    assert targets.FILE_REGISTERS == 65536


def test_nothing_is_predicted_for_other_gpus() -> None:
    assert predictions.gpu_of("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    for name in ("NVIDIA GeForce RTX 4090", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB"):
        assert predictions.gpu_of(name) is None
