"""Steps of a whole model through the compiled library, against the same model through plain torch."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.selection import mostly_slow
from support.step_runs import StepRun
from support.tiny_models import build_model
from torch import Tensor

from aioengine.errors import ConfigError
from aioengine.kernels.cpu import build
from aioengine.model import coverage, native
from aioengine.model.spec import Quantization
from aioengine.step import Sampled, SequenceWork

pytestmark = pytest.mark.skipif(build.shutil.which("c++") is None, reason="needs a C++ compiler")
BLOCKS = 64
FEW, LONG = [(-1, 1), (0, 1), (1, 3), (1, 2), (2, 1), (3, 9)], [(-1, 20), (0, 70), (2, 1), (3, 65)]
"""Sequences by slot and tokens: segments that are added after the linear, and in its registers."""


@functools.cache
def model() -> Path:
    return build_model(Path(tempfile.mkdtemp()), "llama")


class Run(StepRun):
    def __init__(
        self,
        dtype: torch.dtype,
        kernels: str,
        ranks: Sequence[int],
        quantization: Quantization = "none",
        *,
        whole: bool = True,
        int8_cache: bool = False,
    ) -> None:
        super().__init__(
            *(model(), ranks), dtype=dtype, num_blocks=BLOCKS, block_size=16, kernels=kernels,
            quantization=quantization, kv_cache_dtype="int8" if int8_cache else "auto",
        )  # fmt: skip
        assert (self.runner.model.compiled) == (kernels == "cpu" and whole)

    def __call__(self, sequences: Sequence[tuple[int, int]]) -> Tensor:
        """Logits after whole prompts, of (slot, tokens)."""
        work, used = [], 0
        for i, (slot, count) in enumerate(sequences):
            table = range(used, used + count // 16 + 1)
            work.append((slot, 0, [(7 * i + 3 * j) % 200 + 5 for j in range(count)], table))
            used = table.stop
        return self.execute(work)


@pytest.mark.parametrize("sequences", [FEW, LONG])
@pytest.mark.parametrize(
    "ranks",
    [
        *((16, 16, 16, 16), (64, 5, 16, 33), (24, 20, 3, 24), (12, 12, 1, 9), (8, 3, 2, 8), (4, 3, 1, 4)),
        *((2, 1, 2, 2), (1, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_a_step_is_that_of_torch(
    dtype: torch.dtype, ranks: tuple[int, ...], sequences: list[tuple[int, int]]
) -> None:
    expected = Run(torch.float32, "torch", ranks)(sequences)
    base = Run(torch.float32, "torch", ranks)([(-1, tokens) for _, tokens in sequences])
    found = Run(dtype, "cpu", ranks)(sequences)
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert (found - expected).norm() < bound * expected.norm()
    assert (base - expected).norm() > 0.1 * expected.norm(), "the adapters change what is compared"


@pytest.mark.parametrize("sequences", [FEW, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_is_one_operation_by_operation(
    dtype: torch.dtype, sequences: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it runs where the library does not cover a whole step."""
    monkeypatch.setattr(coverage, "not_covered", lambda *_, **__: "this test")
    ranks = (64, 5, 16, 33)
    expected = Run(torch.float32, "torch", ranks)(sequences)
    found = Run(dtype, "cpu", ranks, whole=False)(sequences)
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize("sequences", [FEW, LONG])
def test_angles_that_are_not_kept_are_the_same(
    sequences: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Run(torch.bfloat16, "cpu", (16, 8))([(min(slot, 1), tokens) for slot, tokens in sequences])
    monkeypatch.setattr(native, "KNOWN_POSITIONS", 0)
    assert torch.equal(kept, Run(torch.bfloat16, "cpu", (16, 8))([(min(s, 1), n) for s, n in sequences]))


class Greedy(Run):
    """Asks for the most likely tokens, again, and for those of other logits."""

    def sample(self, logits: Tensor, rows: Sequence[SequenceWork]) -> list[Sampled]:
        assert self.runner.model.compiled
        argmax = self.runner.model.argmax
        self.best = [argmax(of).tolist() for of in (logits, logits, -logits, logits)]
        return super().sample(logits, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_finds_the_most_likely_tokens(dtype: torch.dtype) -> None:
    run = Greedy(dtype, "cpu", (16, 8, 4, 2))
    for sequences in (FEW, FEW[:2], LONG, FEW):
        logits = run(sequences)
        most, least = logits.argmax(-1).tolist(), (-logits).argmax(-1).tolist()
        assert run.best == [most, most, least, most]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_cache_is_close_and_smaller(dtype: torch.dtype) -> None:
    ranks = (16, 16, 4, 16)
    exact, int8 = Run(dtype, "cpu", ranks), Run(dtype, "cpu", ranks, int8_cache=True)
    expected, found = exact(LONG), int8(LONG)
    assert 0 < (found - expected).norm() < 0.06 * expected.norm()
    spec = exact.runner.spec
    scales = 2 * spec.num_layers * spec.num_kv_heads * 2 * 16 * BLOCKS
    assert int8.runner.kv_cache.nbytes == exact.runner.kv_cache.nbytes // dtype.itemsize + scales


def test_what_is_not_finite_stays_so_in_an_int8_cache() -> None:
    run = Run(torch.float32, "cpu", (4,), int8_cache=True)
    sequences = [(-1, 20), (0, 20)]
    before = run(sequences)
    assert run.runner.lora_slots is not None
    run.runner.lora_slots.memory.memory.fill_(torch.inf)
    after = run(sequences)
    assert torch.equal(after[0], before[0]), "another sequence"
    assert not after[1].isfinite().any()


@pytest.mark.parametrize("sequences", [FEW, LONG])
def test_int8_is_close_and_smaller(sequences: list[tuple[int, int]]) -> None:
    ranks = (16, 16, 4, 16)
    exact, int8 = Run(torch.float32, "torch", ranks), Run(torch.float32, "cpu", ranks, "int8")
    expected, found = exact(sequences), int8(sequences)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    assert int8.runner.model.nbytes < 0.5 * exact.runner.model.nbytes
    weight, true = (run.runner.model.base_weight(1, "up_proj")[0].whole() for run in (int8, exact))
    assert 0 < (weight - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("quantization", mostly_slow(["none", "int8", "int4"], "none"))
@pytest.mark.parametrize("sequences", [FEW, LONG])
@pytest.mark.slow
def test_threads_change_nothing(sequences: list[tuple[int, int]], quantization: Quantization) -> None:
    """Not a bit, and more of them than processors only take longer."""
    run = Run(torch.bfloat16, "cpu", (64, 5, 16, 33), quantization)
    threads = torch.get_num_threads()
    alone = run(sequences)
    try:
        for several in (2, 3, 2 * (os.cpu_count() or 1) + 1):
            torch.set_num_threads(several)
            for _ in range(20):
                assert torch.equal(run(sequences), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sequences", [FEW, LONG])
def test_int4_is_the_model_with_the_weights_in_effect(sequences: list[tuple[int, int]]) -> None:
    """Up to what int8 activations lose, which is little."""
    ranks = (16, 16, 4, 16)
    int4, plain = Run(torch.float32, "cpu", ranks, "int4"), Run(torch.float32, "torch", ranks)
    true = plain(sequences)
    targets = [layer.linears.values() for layer in plain.runner.model.layers]
    stored = [layer.linears.values() for layer in int4.runner.model.layers]
    pairs = [pair for both in zip(targets, stored, strict=True) for pair in zip(*both, strict=True)]
    for target, source in (*pairs, (plain.runner.model.head, int4.runner.model.head)):
        rows = target.weight.rows(0, target.weight.n)
        rows.copy_(source.weight.rows(0, source.weight.n))
    expected, found = plain(sequences), int4(sequences)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    assert (expected - true).norm() > 2 * (found - expected).norm(), "most of the loss is the weights'"
    assert int4.runner.model.nbytes < 0.3 * plain.runner.model.nbytes


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_without_the_library_it_says_what_is_needed(quantization: Quantization) -> None:
    with pytest.raises(ConfigError, match=rf"quantization='{quantization}'.*C\+\+.*backend 'torch'"):
        Run(torch.float32, "torch", (4,), quantization)


def test_a_profile_names_every_phase() -> None:
    from aioengine.kernels.cpu.structs import PHASES

    run = Run(torch.float32, "cpu", (1,))
    assert run.runner.model.compiled
    run.runner.model.seconds = torch.zeros(len(PHASES), dtype=torch.float64)
    run([(0, 3)])
    found = dict(zip(PHASES, run.runner.model.seconds.tolist(), strict=True))
    assert all(found[phase] > 0 for phase in PHASES if phase not in ("affine", "exchange", "route"))
