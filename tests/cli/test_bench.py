"""``aioengine bench`` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.engine_fixtures import Tiny, tiny_text

from aioengine import EngineConfig
from aioengine.cli.main import main
from aioengine.errors import ConfigError

__all__ = ["tiny_text"]

SMALL = ["--requests", "3", "--prompt-tokens", "8", "--output-tokens", "4", "--repeats", "1"]


def test_it_prints_a_row_for_each_number_of_adapters(
    tiny_text: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ["--model", str(tiny_text.model), "--dtype", "float32", "--kv-cache-memory", "8MiB"]
    assert main(["bench", *SMALL, *engine, "--adapters", "1", "3", "--rank", "5"]) == 0
    out = capsys.readouterr().out
    assert "3 requests x 8 + 4 tokens" in out
    rows = {line.strip().split("  ")[0]: line.split() for line in out.splitlines() if "%" in line}
    assert list(rows) == ["base", "1 adapters, rank 5", "3 adapters, rank 5"]
    assert rows["base"][-1] == "100%" and float(rows["base"][1]) > 0


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("", [], (9, 9, 8, 3, 12, 2048)),
        ("[lora]\nmax_loras = 2", [], (2, 9, 8, 3, 12, 2048)),
        ("[lora]\nmax_cpu_loras = 4", [], (4, 4, 8, 3, 12, 2048)),
        ("[lora]\nmax_lora_rank = 64\nmax_loras = 20", [], (20, 20, 64, 3, 12, 2048)),
        ("[lora]\nmax_loras = 2", ["--max-loras", "3", "--max-lora-rank", "16"], (3, 9, 16, 3, 12, 2048)),
        ("max_num_seqs = 2\nmax_model_len = 64", ["--max-num-batched-tokens", "2"], (9, 9, 8, 2, 64, 2)),
    ],
)
def test_what_the_file_or_the_flags_set_is_kept(
    file: str,
    flags: list[str],
    expected: tuple[int, ...],
    tiny_text: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configs: list[EngineConfig] = []

    def make(config: EngineConfig) -> None:
        configs.append(config)
        raise ConfigError("that is enough")

    monkeypatch.setattr("aioengine.cli.bench.AsyncEngine", make)
    path = tmp_path / "engine.toml"
    path.write_text(f"model = {str(tiny_text.model)!r}\n{file}\n")
    assert main(["bench", *SMALL, "--config", str(path), *flags, "--adapters", "9", "--rank", "5"]) == 2
    assert "that is enough" in capsys.readouterr().err
    [config] = configs
    lora = config.lora
    assert lora is not None
    found = lora.max_loras, lora.max_cpu_loras, lora.max_lora_rank
    assert (*found, config.max_num_seqs, config.max_model_len, config.max_num_batched_tokens) == expected
