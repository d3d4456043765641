"""What the README shows is what the examples contain, and it runs."""

from __future__ import annotations

import asyncio
import re
import runpy
from pathlib import Path

import pytest
from support.tiny_chat import build_chat_model
from support.tiny_models import build_adapter

import aioengine
from aioengine import AsyncEngine, EngineConfig, LoRAConfig, SamplingParams
from aioengine.schedulers import SchedulerPolicy, load_policy

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(model, tmp_path_factory.mktemp("adapter"), r=4)


def code(path: Path) -> str:
    """The file without its docstring."""
    return path.read_text(encoding="utf-8").split('"""', 2)[2].strip()


@pytest.mark.parametrize("name", ["embed.py", "my_policy.py"])
def test_the_readme_shows_the_example(name: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code(EXAMPLES / name) in [block.strip() for block in blocks]


def test_embedding_as_shown(
    model: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The snippet as it stands; a tiny model answers in place of the one it names."""
    (tmp_path / "smollm2-135m").symlink_to(model)  # a path wins over a model's name
    (tmp_path / "examples/adapters").mkdir(parents=True)
    (tmp_path / "examples/adapters/sql").symlink_to(adapter)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "embed.py"), run_name="__main__")
    assert len(capsys.readouterr().out) > 5


async def test_the_policy_as_shown(model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest request first, though it came last; and adapters that outnumber the slots."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    policy = load_policy("my_policy:ShortestFirst")
    assert isinstance(policy, SchedulerPolicy)
    config = EngineConfig(
        model=str(model),
        max_num_seqs=1,
        kv_cache_memory="8MiB",
        lora=LoRAConfig(max_loras=1, max_cpu_loras=2),
    )
    ended: list[int] = []

    async with AsyncEngine(config, policy=policy) as engine:
        for name in ("a", "b"):
            engine.register_adapter(name, adapter)
        events: list[aioengine.events.Event] = []
        engine.add_listener(events.append)

        async def ask(max_tokens: int, adapter: str | None) -> None:
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            await engine.complete("Hello", params, adapter=adapter)
            ended.append(max_tokens)

        lengths: dict[int, str | None] = {16: None, 30: "a", 20: "b", 8: None, 4: None}
        async with asyncio.timeout(60):
            await asyncio.gather(*(ask(n, name) for n, name in lengths.items()))
        policy_events = [e for e in events if type(e).__name__.startswith("Policy")]
    assert policy_events == []  # nothing refused, nothing failed
    base = [length for length in ended if lengths[length] is None]
    assert base == [4, 8, 16] or base == [16, 4, 8]  # the first may have run before the others came
    assert sorted(ended) == sorted(lengths)
