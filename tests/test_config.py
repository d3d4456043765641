from __future__ import annotations

import ast
import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.checks import parse_bytes
from aioengine.config import CHANGED, CONFLICTS, REMOVED, Conflict
from aioengine.errors import ConfigError, PolicyError, RequestInvalid
from aioengine.fleet.config import FleetConfig
from aioengine.request import RequestOptions, SamplingParams
from aioengine.schedulers import load_policy, registry


@pytest.mark.parametrize("rank", [0, 3, 1024, 16.0, "16", True, None])
def test_other_ranks_are_refused_with_the_list(rank: Any) -> None:
    with pytest.raises(ConfigError, match=r"max_lora_rank.*allowed.* 1, 2, 4, 8, 16, 32, 64, 128, 256, 320"):
        LoRAConfig(max_lora_rank=rank)


def test_max_cpu_loras_defaults_to_max_loras_and_must_not_be_less() -> None:
    assert LoRAConfig(max_loras=7).max_cpu_loras == 7
    assert LoRAConfig(max_loras=7, max_cpu_loras=9).max_cpu_loras == 9
    with pytest.raises(ConfigError, match=r"max_cpu_loras=2.*max_loras=3.*raise"):
        LoRAConfig(max_loras=3, max_cpu_loras=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_loras": 0}, "max_loras=0: must be >= 1"),
        ({"max_loras": "4"}, "max_loras='4': must be an integer"),
        ({"fully_sharded_loras": 1}, "fully_sharded_loras=1"),
        ({"lora_dtype": "float8"}, "lora_dtype='float8': allowed are auto, bfloat16"),
        ({"load_retries": -1}, "load_retries=-1: must be >= 0"),
        ({"load_timeout": 0}, "load_timeout=0: must be more than 0 seconds"),
        ({"max_cpu_lora_bytes": "2 gigs"}, "max_cpu_lora_bytes='2 gigs': must be bytes, or text"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", 3]}, "target_modules.1.=3: must be text"),
    ],
)
def test_bad_lora_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "model=''"),
        ({"dtype": "bf16"}, "dtype='bf16': allowed are auto, bfloat16"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens=8: must be >= max_num_seqs=64"),
        ({"kv_cache_memory": -1}, "kv_cache_memory=-1"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"executor": "mpi"}, "executor='mpi'"),
        ({"restart": "on-failure"}, "restart='on-failure': executor='thread'"),
        ({"executor": "process", "restart": "on-fail"}, "did you mean 'on-failure'"),
        ({"max_step_seconds": 0}, "max_step_seconds=0: must be more than 0 seconds"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching='yes'"),
        ({"lora": {"max_loras": 1}}, "lora="),
        ({"policy": ""}, "policy=''"),
    ],
)
def test_bad_engine_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**{"model": "m", **fields})


def test_configs_are_frozen() -> None:
    config = EngineConfig(model="m")
    with pytest.raises(AttributeError):
        config.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1024", 1024), (7, 7), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("512 mib", 2**29)],
)
def test_sizes(text: int | str, value: int) -> None:
    assert parse_bytes(text, field="x") == value
    assert EngineConfig(model="m", kv_cache_memory=text).kv_cache_memory == value


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text(
        'model = "m"\nkv_cache_memory = "1GiB"\npolicy = "fcfs:max_wait=2"\n'
        "[lora]\nmax_loras = 8\nmax_cpu_loras = 64\ntarget_modules = ['v_proj', 'q_proj']\n"
    )
    config = EngineConfig.from_toml(path, max_num_seqs=3)
    assert config.lora == LoRAConfig(max_loras=8, max_cpu_loras=64, target_modules=("q_proj", "v_proj"))
    assert (config.kv_cache_memory, config.max_num_seqs) == (2**30, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "m"\nmax_lora = 3', "unknown field 'max_lora'"),
        ('model = "m"\n[lora]\nmax_lora = 3', "table lora: unknown field 'max_lora'.*'max_loras'"),
        ("max_num_seqs = 3", "model"),
        ('model = "m"\nmax_num_seqs = "three"', "max_num_seqs"),
        ('model = "m"\nmax_num_seqs = 0', "max_num_seqs=0"),
        ("model = ", "not valid TOML"),
        ('model = "m"\nmax_cpu_loras = 3', r"below a line \[lora\]"),
        ('model = "m"\n[lora]\nmax_cpu_loras = "x"', "table lora: max_cpu_loras='x': must be an integer"),
        ('model = "m"\n[lora]\nmax_lora_rank = 17', "max_lora_rank=17: allowed are 1, 2, 4"),
    ],
)
def test_bad_toml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "engine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        EngineConfig.from_toml(path)
    assert "engine.toml" in str(caught.value) and "$" not in str(caught.value)


def test_a_missing_toml_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        EngineConfig.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("fcsf", "did you mean 'fcfs'"),
        ("fcfs:max_wiat=3", "max_wiat"),
        ("fcfs:3", "name=value"),
        ("fcfs:max_wait=-1", "max_wait=-1"),
        ("no.such:Thing", "cannot import"),
        ("aioengine.config:EngineConfig", "not a subclass of SchedulerPolicy"),
    ],
)
def test_bad_policies(policy: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        AsyncEngine(EngineConfig(model="m", policy=policy))


def test_a_policy_by_path_and_by_instance() -> None:
    from aioengine.schedulers.policies.fcfs import FCFS

    AsyncEngine(EngineConfig(model="m", policy="aioengine.schedulers.policies.fcfs:FCFS:max_wait=3"))
    AsyncEngine(EngineConfig(model="m"), policy=FCFS(max_wait=2))
    with pytest.raises(PolicyError, match="must be a SchedulerPolicy"):
        AsyncEngine(EngineConfig(model="m"), policy="fcfs")  # type: ignore[arg-type]


@pytest.mark.parametrize("removed", REMOVED)
def test_what_was_removed_is_refused_with_what_to_do(removed: str) -> None:
    name, _, text = removed.partition("=")
    value = ast.literal_eval(text) if text else "anything"
    tables = [{"model": "m", name: value}, {"model": "m", "lora": {name: value}}]
    for values in tables:
        with pytest.raises(ConfigError, match=f"{re.escape(removed)} was removed: "):
            EngineConfig.from_dict(values)
    for kind in (EngineConfig, LoRAConfig):
        with pytest.raises(ConfigError, match=f"{re.escape(removed)} was removed: "):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        *((name, name) for name in registry.REMOVED),
        ("dlora:alone=2", "dlora"),
        ({"name": "dlora", "alone": 2}, "dlora"),
        ({"order": "toppings", "max_wait": 2}, "toppings"),
        ({"order": "edf", "prefetch": {"name": "popular"}}, "popular"),
        ("toppings+gdsf", "toppings"),
        ("fcfs + popular", "popular"),
    ],
)
def test_removed_policies_and_parts_are_refused_with_what_to_do(policy: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^policy='{name}' was removed: .* Take '"):
        EngineConfig(model="m", policy=policy)
    with pytest.raises(ValueError, match=f"policy='{name}' was removed: .* Take '"):
        load_policy(policy)


WEIRD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_whatever_a_field_is_given_it_is_taken_or_refused(data: st.DataObject) -> None:
    kinds: list[tuple[Any, type[Exception], dict[str, Any]]] = [
        (EngineConfig, ConfigError, {"model": "m"}),
        (LoRAConfig, ConfigError, {}),
        (FleetConfig, ConfigError, {"engine": EngineConfig(model="m")}),
        (SamplingParams, RequestInvalid, {}),
        (RequestOptions, RequestInvalid, {}),
    ]
    kind, error, needed = data.draw(st.sampled_from(kinds))
    field, value = data.draw(st.sampled_from(kind.__struct_fields__)), data.draw(WEIRD)
    with contextlib.suppress(error):
        kind(**{**needed, field: value})


@pytest.mark.parametrize("conflict", CONFLICTS, ids=lambda conflict: " ".join(conflict.settings))
def test_settings_that_exclude_each_other_are_refused_and_documented(conflict: Conflict) -> None:
    """Every pair of the table by itself, and its line in docs/configuration.md."""
    other = {"tensor_parallel_size": 2, "restart": "on-failure", "speculation": "ngram"}
    fields = {name: other[name] if value == CHANGED else value for name, value in conflict.settings.items()}
    lora = {name: fields.pop(name) for name in list(fields) if name in LoRAConfig.__struct_fields__}
    if "executor" not in fields:
        fields["executor"] = "process"
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_dict({"model": "m", **fields, "lora": lora})
    assert f": {conflict.why}; set {conflict.instead}" in str(caught.value)
    settings = ", ".join(
        f"`{name}`" if value == CHANGED else f"`{name}={value!r}`"
        for name, value in conflict.settings.items()
    )
    line = f"| {settings} | {conflict.why} | {conflict.instead} |"
    assert line in (Path(__file__).resolve().parents[1] / "docs" / "configuration.md").read_text()
