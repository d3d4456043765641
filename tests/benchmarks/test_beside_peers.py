"""What ``beside_peers`` asks of engines, what it makes of their times, and files for llama.cpp."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_gguf import interleaved, tiny_model, write_gguf

from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec
from benchmarks.peers.beside import WORKERS, Work
from benchmarks.peers.environments import PEERS, PeerFailed, run_logged
from benchmarks.peers.gguf_files import write_adapter, write_bfloat16
from benchmarks.peers.workers import job


def test_every_peer_has_a_worker() -> None:
    for name in PEERS:
        assert (WORKERS / f"run_{name}.py").exists()
    names = [variant for peer in PEERS.values() for variant in peer.variants]
    assert len(set(names)) == len(names)


def test_all_engines_get_the_same_prompts() -> None:
    plain, adapted = Work(8).case(500), Work(8, adapters=8).case(500)
    assert plain["prompts"] == adapted["prompts"] and [len(ids) for ids in plain["prompts"]] == [128] * 8
    assert adapted["adapters"] == list(range(8)) and plain["adapters"] == [None] * 8
    assert json.loads(json.dumps(plain)) == Work(8).case(500)
    assert Work(32, adapters=8).case(500)["adapters"] == [i % 8 for i in range(32)]


def test_a_peer_that_fails_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(PeerFailed, match=r"ended with 1, see .*log: no such engine"):
        run_logged([sys.executable, "-c", "raise SystemExit('no such engine')"], log)
    run_logged([sys.executable, "-c", "print(input())"], log, text="heard")
    assert log.read_text() == "heard\n"


def test_a_worker_times_what_was_asked_and_nothing_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = {"name": "c", "prompts": [[1], [2], [3]], "output": 6, "adapters": [1, None, 1]}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"cases": [case]})))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "result")])
    work = job.read_job()
    with pytest.raises(ValueError, match="3 outputs of"):
        job.run(work, "1.0", lambda case: [[0] * (case.output - 1)] * 3)
    assert not (tmp_path / "result").exists()
    asked = []

    def generate(case: job.Case) -> list[list[int]]:
        asked.append((case.output, case.by_adapter()))
        return [[ids[0] + 10] * case.output for ids in case.prompts]

    job.run(work, "1.0", generate)
    assert asked == [(4, {1: [0, 2], None: [1]}), (6, {1: [0, 2], None: [1]})]
    result = json.loads((tmp_path / "result").read_text())
    assert result["first"] == {"c": [11, 12, 13]} and result["seconds"]["c"] >= 0


def test_gguf_files_for_llama_cpp(tmp_path: Path) -> None:
    model = tiny_model("llama")
    source = write_gguf(tmp_path / "model.gguf", model, "llama", "Q8_0", metadata={"general.name": "tiny"})
    written = gguf.GGUFReader(str(write_bfloat16(source, tmp_path / "bf16.gguf")))
    assert written.fields["general.name"].contents() == "tiny"
    originals = {tensor.name: tensor for tensor in gguf.GGUFReader(str(source)).tensors}
    assert originals.keys() == {tensor.name for tensor in written.tensors}
    for tensor in written.tensors:
        original = originals[tensor.name]
        values = torch.from_numpy(gguf.dequantize(original.data, original.tensor_type).copy())
        if values.ndim > 1:
            assert tensor.tensor_type is gguf.GGMLQuantizationType.BF16
            values = values.to(torch.bfloat16).float()
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        torch.testing.assert_close(found, values, rtol=0, atol=0)


def test_adapters_for_llama_cpp(tmp_path: Path) -> None:
    """B A of the file is the change of llama.cpp's weight, whose rows of q and k have another order."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    spec = read_spec(tmp_path / "model")
    folder = write_random_adapter(tmp_path / "adapter", spec, 4, seed=0, dtype="float32")
    file = gguf.GGUFReader(str(write_adapter(folder, tmp_path / "model", tmp_path / "adapter.gguf")))
    assert file.fields["adapter.lora.alpha"].contents() == 8.0
    found = {tensor.name: tensor.data for tensor in file.tensors}
    peft = {key: tensor.numpy() for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    assert len(found) == len(peft)
    at = "base_model.model.model.layers.1"
    for ours, theirs, heads in (
        ("self_attn.q_proj", "attn_q", spec.num_heads),
        ("self_attn.k_proj", "attn_k", spec.num_kv_heads),
        ("self_attn.v_proj", "attn_v", None),
        ("mlp.down_proj", "ffn_down", None),
    ):
        delta = peft[f"{at}.{ours}.lora_B.weight"] @ peft[f"{at}.{ours}.lora_A.weight"]
        expected = delta if heads is None else interleaved(delta, heads)
        weight = f"blk.1.{theirs}.weight"
        np.testing.assert_array_equal(found[f"{weight}.lora_b"] @ found[f"{weight}.lora_a"], expected)
