"""What `benchmarks.beside_peers` asks of engines, what it makes of their times, and files for llama.cpp."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from benchmarks.beside_peers import BEGIN, END, Found, Work, agreement, put_between, table, works
from safetensors.torch import load_file
from support.tiny_gguf import interleaved, tiny_model, write_gguf

from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec
from benchmarks.peers import job
from benchmarks.peers.environments import PEERS, Peer, PeerFailed, Places, Variant, environment, run_logged
from benchmarks.peers.gguf_files import write_adapter, write_bfloat16


def test_every_peer_has_a_worker() -> None:
    for peer in PEERS:
        assert Path(job.__file__).with_name(f"run_{peer.name}.py").exists()
    names = [variant.name for peer in PEERS for variant in peer.variants]
    assert len(set(names)) == len(names)


def test_all_engines_get_the_same_prompts() -> None:
    columns = works([1, 8])
    assert [work.title for work in columns] == ["1", "8", "8 with adapters", "first of 512, ms"]
    plain, adapted = columns[1].case(500), columns[2].case(500)
    assert plain["prompts"] == adapted["prompts"] and [len(ids) for ids in plain["prompts"]] == [128] * 8
    assert adapted["adapters"] == list(range(8)) and plain["adapters"] == [None] * 8
    assert json.loads(json.dumps(plain)) == columns[1].case(500)
    assert Work("32", 32, adapters=8).case(500)["adapters"] == [i % 8 for i in range(32)]


def test_medians_and_spread() -> None:
    columns = [Work("8", 8), Work("8 with adapters", 8, adapters=8), Work("first", 1, 512, 1)]
    seconds = {"8": [2.0, 1.0, 4.0], "8 with adapters": [64.0], "first": [0.25]}
    found = {"fast": Found("1.0", seconds, {}), "slow": Found("2.0", {"8": [512.0]}, {})}
    text = table(found, columns, {"fast": "in turn", "slow": "mixed"})
    assert text.splitlines() == [
        "| | 8 | 8 with adapters | first |",
        "|---|---|---|---|",
        "| fast | 256 ±75% | 8.0* ±0% | 250 ±0% |",  # 512 tokens in 2, 1 and 4 seconds
        "| slow | 1.0 ±0% |  |  |",
    ]


def test_first_tokens_are_compared() -> None:
    one = Found("", {}, {"8": [1, 2], "8 with adapters": [3, 4]})
    other = Found("", {}, {"8": [1, 2], "8 with adapters": [3, 5]})
    assert agreement({"a": one, "b": other}, "a") == "a 100% and 100%, b 100% and 50%"


def test_the_table_goes_between_the_marks() -> None:
    assert put_between(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    for text in ("nothing", BEGIN, f"{END} {BEGIN}"):
        with pytest.raises(ValueError, match="in the file to write to"):
            put_between(text, "new")


def test_a_peer_is_installed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], log: Path, environment: object = None) -> None:
        ran.append(command)
        (tmp_path / "engine").mkdir(exist_ok=True)

    monkeypatch.setattr("benchmarks.peers.environments.run_logged", run)
    places = Places(tmp_path, tmp_path)
    engine = Peer("engine", ("one==1",), (Variant("one", {}, ""),))
    python = environment(engine, places)
    assert python == tmp_path / "engine/bin/python" and [command[-1] for command in ran] == [
        str(tmp_path / "engine"),
        "one==1",
    ]
    assert environment(engine, places) == python and len(ran) == 2
    environment(engine._replace(packages=("one==2",)), places)
    assert ran[-1][-1] == "one==2"
    assert environment(PEERS[0], places) == Path(sys.executable)  # this engine needs none


def test_a_peer_that_fails_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(PeerFailed, match=r"ended with 1, see .*log:(.|\n)*no such engine"):
        run_logged([sys.executable, "-c", "raise SystemExit('no such engine')"], log)
    run_logged([sys.executable, "-c", "print(input())"], log, text="heard")
    assert log.read_text() == "heard\n"


def one_job(monkeypatch: pytest.MonkeyPatch, result: Path) -> dict[str, object]:
    case = {"name": "c", "prompts": [[1], [2], [3]], "output": 6, "adapters": [1, None, 1]}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"cases": [case]})))
    monkeypatch.setattr(sys, "argv", ["worker", str(result)])
    found: dict[str, object] = job.read_job()
    return found


def test_a_worker_times_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = one_job(monkeypatch, tmp_path / "result")
    asked = []

    def generate(case: job.Case) -> list[list[int]]:
        asked.append((case.output, case.by_adapter()))
        return [[ids[0] + 10] * case.output for ids in case.prompts]

    job.run(work, "1.0", generate)
    assert asked == [(4, {1: [0, 2], None: [1]}), (6, {1: [0, 2], None: [1]})]
    result = json.loads((tmp_path / "result").read_text())
    assert result["first"] == {"c": [11, 12, 13]} and result["seconds"]["c"] >= 0


def test_a_worker_whose_engine_did_less_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = one_job(monkeypatch, tmp_path / "result")
    with pytest.raises(ValueError, match="3 outputs of"):
        job.run(work, "1.0", lambda case: [[0] * (case.output - 1)] * 3)
    assert not (tmp_path / "result").exists()


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
