"""The commands as a user runs them: output, exit codes, and errors in one line."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from support.cli_programs import run_program, run_script

from aioengine.cli.main import main

SMALL = ["--kv-cache-memory", "8MiB", "--dtype", "float32", "--device", "cpu"]


def feed(monkeypatch: pytest.MonkeyPatch, *lines: object) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from aioengine.cli.main import COMMANDS, main\n"
        "for command in ([], *map(str.split, COMMANDS)):\n"
        "    assert main([*command, '--help']) == 0\n"
        "    heavy = {'torch', 'polars', 'vl_convert', 'numpy', 'scipy'} & set(sys.modules)\n"
        "    assert 'torch' not in heavy and (command[:1] != ['lab'] or not heavy), command\n"
        "main(['policies'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = run_script(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["plan", "--model", "/nowhere"], "/nowhere"),
        (["plan", "--nonsense"], "--nonsense"),
        (["plan", "--kv-cache-memory", "900TiB"], "kv_cache_memory"),
        (["plan", "--max-lora", "3"], "--max-loras"),
        (["plan", "--dtype", "float3"], "float32"),
        (["plan", "--model", __file__], "not a .gguf file"),
        (["--model", "x", "plan"], 'Unknown command "--model"'),
        (["top", "--once"], "aioengine top was removed: the server's page"),
        (["lab", "record", "requests.jsonl"], "aioengine lab record was removed: aioengine serve --record"),
        (["plan", "here"], "['here']. See aioengine plan --help"),
        (["lab", "calibrate", "here"], "['here']. See aioengine lab calibrate --help"),
        (["generate", "hi", "--n", "2"], "--json"),
        (["generate", "hi", "--adapter", "nobody"], "nobody"),
        (["generate", "hi", "--adapter", ""], "adapter '': no"),
        (["generate", "--lora-modules", "a=b", "hi"], "after --"),
        (["demo", "--adapters", "/nowhere"], "/nowhere"),
        (["demo", "--requests", "0"], "--requests"),
        (["nonsense"], "nonsense"),
    ],
)
@pytest.mark.slow
def test_what_is_refused_says_so_in_one_line(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.startswith("aioengine: ") and error.count("\n") == 1


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, name in (
        (["lab", "size", "--workload", "w.toml"], "--slo"),
        (["lab", "new"], "FOLDER"),
        (["plan", "--lora-modules"], "--lora-modules"),
    ):
        assert main(arguments) == 2
        assert f"parameter {name} requires" in capsys.readouterr().err


def test_debug_adds_the_traceback_and_changes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "/nowhere"]) == 2
    line = capsys.readouterr().err
    assert main(["plan", "--model", "/nowhere", "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and error.endswith(line)


def test_debug_is_a_flag_only_where_a_flag_can_stand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model=--debug"]) == 2
    error = capsys.readouterr().err
    assert "model='--debug'" in error and "Traceback" not in error


def test_an_error_that_is_not_ours_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("aioengine.cli.plan.plan_memory", broken)
    assert main(["plan"]) == 1
    assert capsys.readouterr().err == "aioengine: unexpected MemoryError: no room (--debug shows where)\n"


@pytest.mark.slow
def test_a_model_that_only_the_hub_has(tmp_path: Path) -> None:
    offline = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run_program("plan", "--model", "nobody/nothing", env=offline)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "aioengine: model='nobody/nothing': no such folder, and it cannot be downloaded from the Hub: "
    )
    assert "set 'HF_HUB_OFFLINE=0'" in done.stderr and done.stderr.count("\n") == 1


def test_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-loras", "3", "--max-lora-rank", "8", "--kv-cache-memory", "1MiB"]
    assert main(["plan", "--model", str(model), "--dtype", "float32", *flags]) == 0
    out = capsys.readouterr().out
    # hidden 64, intermediate 96, 3 layers, rank 8, float32, 3 slots
    q_proj = 3 * 3 * 8 * (64 + 64) * 4
    down_proj = 3 * 3 * 8 * (96 + 64) * 4
    assert f"{q_proj:,}" in next(line for line in out.splitlines() if "q_proj" in line)
    assert f"{down_proj:,}" in next(line for line in out.splitlines() if "down_proj" in line)
    for word in ("base weights", "KV blocks", "CPU adapter cache", "total"):
        (line,) = (line for line in out.splitlines() if line.lstrip().startswith(word))
        assert "│" not in line  # it is no terminal


def test_plan_says_whether_tokens_depend_on_the_batch(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ["plan", "--model", str(model), "--kv-cache-memory", "1MiB", "--device", "cpu"]
    monkeypatch.setattr("aioengine.kernels.cpu.build.obstacle", lambda: None)
    monkeypatch.setenv("AIOENGINE_CPU_LEVEL", "generic")
    assert main([*plan, "--batch-invariant"]) == 0
    out = capsys.readouterr().out
    assert "batch invariance on" in out and "CPU kernels: generic" in out
    assert main([*plan, "--block-size", "8"]) == 0
    assert "batch invariance off: " in (out := capsys.readouterr().out) and "block_size 8" in out
    assert main([*plan, "--block-size", "8", "--batch-invariant"]) == 2
    assert "batch_invariant=True" in capsys.readouterr().err
    monkeypatch.setattr("aioengine.kernels.cpu.build.obstacle", lambda: "no C++ compiler is found")
    assert main(plan) == 0
    assert "no C++ compiler is found" in capsys.readouterr().out


def test_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  fcfs") for line in lines)
    at = next(i for i, line in enumerate(lines) if line.startswith("  oracle "))
    assert "lab only" in "".join(lines[at : at + 4])


@pytest.mark.slow
def test_generate(model: Path, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(model), *SMALL, "--max-tokens", "12", "--ignore-eos"]
    assert main(["generate", "Hello", *common]) == 0
    base = capsys.readouterr().out
    assert len(base) > 1 and base.endswith("\n")
    assert main(["generate", "Hello", *common, "--adapter", str(adapters / "sql")]) == 0
    by_folder = capsys.readouterr().out
    named = ["--lora-modules", f"x={adapters / 'json'}", f"s={adapters / 'sql'}"]
    assert main(["generate", "Hello", *common, *named, "--adapter", "s"]) == 0
    assert capsys.readouterr().out == by_folder != base
    assert main(["generate", "Hello", *common, "--adapter-root", str(adapters), "--adapter", "sql"]) == 0
    assert capsys.readouterr().out == by_folder
    assert main(["generate", "Hello", *common, "--system", "Be brief"]) == 0
    assert capsys.readouterr().out != base  # through the chat template


def test_several_answers_to_a_request(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their seeds are made from the request's: the same each time, unlike each other, and the first is
    what n=1 gives."""
    seeded = {"prompt": "Hello", "seed": 7, "temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
    feed(monkeypatch, {**seeded, "n": 3}, {**seeded, "n": 3}, seeded)
    assert main(["generate", "--model", str(model), *SMALL, "--n", "1"]) == 0
    first, second, single = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["choices"] == second["choices"]
    assert len({tuple(choice["token_ids"]) for choice in first["choices"]}) == 3
    assert first["choices"][0]["token_ids"] == single["token_ids"]
    assert first["prompt_tokens"] == single["prompt_tokens"] == 5


def test_a_deadline_that_passes_is_an_error_of_its_request(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    late = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "deadline": 1e-6, "n": 2}
    feed(monkeypatch, late, {"prompt": "Hello", "priority": 3, "tenant": "t"})
    assert main(["generate", "--model", str(model), *SMALL, "--max-tokens", "2"]) == 1
    failed, fine = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert failed["error"]["type"] == "DeadlineExceeded" and "error" not in fine


def test_a_prompt_whose_adapter_cannot_be_loaded_is_told_why(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "Hello", "--model", str(model), *SMALL, "--adapter", str(tmp_path)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err.splitlines()[-1]


def test_generate_json_lines(
    model: Path,
    adapters: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    feed(
        monkeypatch,
        {"prompt": "Hello", "max_tokens": 9},
        {"prompt": [5, 6, 7], "id": "ids", "logprobs": 1},
        "",
        {"messages": [{"role": "user", "content": "Hi"}], "adapter": "sql"},
        {"prompt": "Hello", "adapter": "nobody"},
        {"prompt": "", "id": "empty"},
    )
    flags = ["--model", str(model), *SMALL, "--max-tokens", "4", "--ignore-eos"]
    registered = ["--lora-modules", f"sql={adapters / 'sql'}", "--max-num-seqs", "1"]
    assert main(["generate", *flags, *registered]) == 1  # two of them failed
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["id"] for answer in answers] == [0, "ids", 2, 3, "empty"]
    assert [len(a.get("token_ids", [])) for a in answers] == [9, 4, 4, 0, 0]
    assert answers[0]["finish_reason"] == "length" and answers[0]["text"]
    assert answers[1]["prompt_tokens"] == 3 and len(answers[1]["logprobs"]) == 4
    assert answers[2]["adapter"] == "sql"
    assert answers[3]["error"]["type"] == "AdapterNotFound"
    assert answers[4]["error"]["type"] == "RequestInvalid"


def test_generate_json_lines_longer_than_the_window(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, *({"prompt": f"Number {n}", "max_tokens": 1 + n % 3} for n in range(20)))
    flags = ["--model", str(model), *SMALL, "--max-num-seqs", "2", "--max-waiting", "3", "--ignore-eos"]
    assert main(["generate", *flags]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["id"] for answer in answers] == list(range(20))
    assert [len(answer["token_ids"]) for answer in answers] == [1 + n % 3 for n in range(20)]


@pytest.mark.parametrize("line", ["{", {"prompt": "a", "temprature": 1}])
def test_a_bad_json_line_is_named_before_anything_runs(
    line: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(monkeypatch, {"prompt": "good"}, line)
    assert main(["generate", "--model", "/nowhere"]) == 2  # the model is not even looked for
    captured = capsys.readouterr()
    assert "line 2" in captured.err and captured.out == ""


@pytest.mark.slow
def test_demo_swaps_and_finishes(model: Path, adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--model", str(model), "--adapters", str(adapters)]
    assert main([*arguments, "--max-tokens", "6"]) == 0
    out = capsys.readouterr().out
    for name in ("base", "sql", "json", "sentiment", "pirate"):
        assert f"{name}-2 done" in out
    assert out.count(": into slot") >= 4  # each adapter had a slot
    assert "out of slot" in out and "evictions from the CPU cache" in out
    assert "12 requests" in out and "found their adapter in one" in out


@pytest.mark.slow
def test_demo_fails_if_a_request_fails(
    model: Path, adapters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "adapters"
    for folder in adapters.iterdir():
        (broken / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            content = file.read_bytes()
            cut = folder.name == "pirate" and file.suffix == ".safetensors"
            (broken / folder.name / file.name).write_bytes(content[:100] if cut else content)
    (tmp_path / "demo.jsonl").write_text((adapters.parent / "demo.jsonl").read_text())
    arguments = ["demo", "--model", str(model), "--adapters", str(broken)]
    assert main([*arguments, "--max-tokens", "4"]) == 1
    out = capsys.readouterr().out
    assert "pirate-1 failed" in out and "sql-2 done" in out
