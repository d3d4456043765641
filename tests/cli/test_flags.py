"""Flags and the configuration file: what wins, and what is refused how."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from aioengine.cli.flags import EngineFlags, check_folders, in_flags
from aioengine.cli.main import main
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "engine.toml"
    path.write_text('model = "m"\nseed = 7\n[lora]\nmax_loras = 2\nmax_lora_rank = 8\n')
    return path


def test_a_default_that_depends_on_another_field_sees_the_flag(file: Path) -> None:
    """Nothing says max_cpu_loras: it must follow the max_loras of the flag, not of the file."""
    config = EngineFlags(config=file, max_loras=6).engine_config()
    assert config.lora is not None and config.lora.cpu_capacity == 6


def test_every_field_has_a_flag() -> None:
    flags = {field.name for field in dataclasses.fields(EngineFlags)}
    fields = {*EngineConfig.__struct_fields__, *LoRAConfig.__struct_fields__}
    assert fields - flags == {"lora"}


def test_flags_in_the_text_of_errors() -> None:
    text = "raise LoRAConfig.max_lora_rank, or EngineConfig.max_waiting; see EngineConfig.lora"
    assert in_flags(text) == "raise --max-lora-rank, or --max-waiting; see EngineConfig.lora"


@pytest.mark.parametrize("given", [["a"], ["=x"], ["a="], ["a=x", "a=y"]])
def test_bad_adapters(given: list[str]) -> None:
    with pytest.raises(ConfigError, match="--lora-modules"):
        EngineFlags(lora_modules=given).adapters()


@pytest.mark.parametrize("given", [("nowhere", "no such folder"), (".", "no adapter_config.json")])
def test_folders_without_an_adapter_are_refused_at_the_start(given: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--lora-modules sql=.*{given[1]}"):
        check_folders({"sql": str(tmp_path / given[0])})


@pytest.mark.parametrize(
    ("variable", "value"), [("OVERLAP", "1"), ("KV_CACHE_DIR", "/x"), ("SLOT_MEMORY", "shared")]
)
def test_variables_of_removed_flags_say_so(
    variable: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(f"AIOENGINE_{variable}", value)
    assert main(["serve"]) == 2
    said = capsys.readouterr().err
    assert f"AIOENGINE_{variable}: " in said and " was removed: " in said


@pytest.mark.parametrize(
    "flags", [["--merge"], ["--no-bind-threads"], ["--policy", "dlora"], ["--policy=dlora:alone=3"]]
)
def test_removed_flags_say_so(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *flags]) == 2
    assert " was removed: " in capsys.readouterr().err
