"""From lab to live: the tutorial as it is written, and its policy in both; papers run again."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
from pathlib import Path

import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, make_engine, tiny, tiny_of

from aioengine.cli.flags import EngineFlags
from aioengine.cli.main import main
from aioengine.schedulers import load_policy
from benchmarks.__main__ import main as benchmark

__all__ = ["make_engine", "tiny", "tiny_of"]

ROOT = Path(__file__).resolve().parents[2]
POLICY = "examples/my_policy.py:ShortestFirst"


def tutorial_commands() -> list[list[str]]:
    """Of the section of docs/lab.md that goes from an idea to a figure."""
    text = (ROOT / "docs" / "lab.md").read_text(encoding="utf-8")
    section = text.split("\n## From an idea", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```\n(.*?)```", section, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("aioengine ")]


def shortened(command: list[str], **values: str) -> list[str]:
    """The command with other values for some of its flags."""
    for name, value in values.items():
        command = [*command]
        command[command.index(f"--{name}") + 1] = value
    return command


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    run, compare, serve = tutorial_commands()
    assert [run[:2], compare[:2], serve[:1]] == [["lab", "run"], ["lab", "compare"], ["serve"]]
    assert main(shortened(run, limit="40", out=str(tmp_path / "first"))) == 0
    assert (tmp_path / "first" / "report.html").is_file()
    short = shortened(compare, limit="20", seeds="1", slots="4", out=str(tmp_path / "compared"))
    assert main([*short, "--jobs", "1"]) == 0
    assert "ShortestFirst" in capsys.readouterr().out
    for command in (run, compare, serve):
        assert POLICY in command[command.index("--policy") + 1]


async def test_the_same_file_in_the_lab_and_live(
    tiny: Tiny, make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    small = ["--arrivals", "poisson:rate=20", "--limit", "10", "--adapters", "3", "--output-tokens", "4"]
    command = ["lab", "run", *small, "--policy", POLICY, "--no-report", "--out", str(tmp_path / "out")]
    assert await asyncio.to_thread(main, command) == 0
    written = json.loads((tmp_path / "out" / "experiment.json").read_text())["experiment"]["policy"]
    assert written == POLICY

    config = EngineFlags(policy=written).engine_config()  # the flags of serve
    assert config.policy == POLICY
    ended: list[str] = []
    async with make_engine(tiny, load_policy(config.policy), max_num_seqs=1) as engine:
        engine.register_adapter("sql", tiny.adapters["rank-3"])

        async def ask(name: str, tokens: int) -> None:
            out = await engine.complete([4, 5, 6], greedy(tokens), adapter="sql")
            assert len(out.token_ids) == tokens
            ended.append(name)

        await asyncio.gather(ask("long", 12), ask("middle", 7), ask("short", 2))
    assert ended == ["short", "middle", "long"]  # they waited together for the adapter


SHORT = {
    "slora": "--counts 5 100 --requests 40",
    "chameleon": "--links 6e9 --rates 2 --requests 40 --seeds 1",
    "toppings": "--rates 2 --requests 40 --seeds 1",
    "loraserve": "--requests 80 --seeds 1",
    "ray": "--each 2",
    "llmd": "--requests 96 --callers 48 --seeds 1",
}


@pytest.mark.parametrize(
    ("paper", "rows"),
    [
        ("slora", ["5 adapters", "100 adapters"]),
        ("chameleon", ["s-lora: arrival, discard", "chameleon's cache alone", "order alone", "chameleon "]),
        ("toppings", ["loads stall the batch", "loads beside the batch", "adapters stay"]),
        ("loraserve", ["least_loaded", "affinity", "by rank"]),
        ("ray", ["holder ", "holder:spill=4", "affinity"]),
        ("llmd", ["round_robin", "prefix", "affinity"]),
    ],
)
@pytest.mark.slow
def test_papers_print_a_table(paper: str, rows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [] if paper == "ray" else ["--jobs", "1"]
    assert benchmark(["papers", paper, *SHORT[paper].split(), *jobs]) == 0
    table = capsys.readouterr().out
    for row in rows:
        lines = [line.split("|") for line in table.splitlines() if line.startswith("|")]
        (cells, *_) = (cells for cells in lines if row in cells[1].lower())
        assert re.search(r"\d", cells[2]), cells


@pytest.mark.slow
def test_service_of_backlogged_clients_in_a_short_run(capsys: pytest.CaptureFixture[str]) -> None:
    """With all adapters in slots, VTC's difference is a small part of that of first come, first served."""
    benchmark(["papers", "vtc", "--requests", "100", "200", "--settings", "1", "--jobs", "1"])
    gaps: dict[str, list[float]] = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and cells[1].startswith(("fcfs,", "vtc,")):
            gaps.setdefault(cells[1].partition(",")[0], []).append(float(cells[2].replace(",", "")))
    assert gaps["fcfs"][-1] > gaps["fcfs"][0] > 4 * gaps["vtc"][-1]
