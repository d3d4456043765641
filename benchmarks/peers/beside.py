"""The same work by this engine and by others."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.cli.bench import random_prompts
from aioengine.model.files.embedded import embedded_model_dir
from benchmarks.peers.environments import PEERS, Places, environment, run_logged
from benchmarks.runner import Calls
from benchmarks.shared.engines import random_adapters

WORKERS = Path(__file__).parent / "workers"
ADAPTERS, VOCABULARY = 8, 49152


class Work(NamedTuple):
    """``requests`` at once, each of ``prompt`` and ``output`` tokens."""

    requests: int
    prompt: int = 128
    output: int = 64
    adapters: int = 0

    @property
    def title(self) -> str:
        if self.output == 1:
            return f"first of {self.prompt}, ms"
        return f"{self.requests} x {self.prompt} + {self.output}, tok/s"

    def value(self, seconds: float) -> float:
        """Return output tokens a second; or milliseconds to the first token, if only one is generated."""
        return 1000 * seconds if self.output == 1 else self.requests * self.output / seconds

    def case(self, vocabulary: int) -> dict[str, Any]:
        """Return a worker's job. Its prompts depend on the work only."""
        rng = random.Random(f"{self.requests} {self.prompt}")
        prompts = random_prompts(vocabulary, self.requests, self.prompt, rng)
        using = [i % self.adapters if self.adapters else None for i in range(self.requests)]
        return {"name": self.title, "prompts": prompts, "output": self.output, "adapters": using}


def run_worker(
    worker: str, python: Path, model: Path, settings: Mapping[str, object], adapters: Sequence[Path],
    works: Sequence[Work], vocabulary: int, log: Path, environment: Mapping[str, str] = {},
) -> tuple[dict[str, float], dict[str, list[int]]]:  # fmt: skip
    """Have an engine do each work once, in a process of its own, after a warm-up. Returns the figure of
    each work, and its requests' first tokens."""
    job = {
        "model": str(model),
        "settings": dict(settings),
        "adapters": list(map(str, adapters)),
        "cases": [work.case(vocabulary) for work in works],
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [str(python), str(WORKERS / f"run_{worker}.py"), str(result)]
        # A folder of its own: some engines start Python again, which would find this package where it runs.
        run_logged(command, log, {**os.environ, **environment}, text=json.dumps(job), cwd=Path(folder))
        answer = json.loads(result.read_text(encoding="utf-8"))
    return {work.title: work.value(answer["seconds"][work.title]) for work in works}, answer["first"]


def beside_peers(
    *, peers: tuple[str, ...] = tuple(PEERS), requests: tuple[int, ...] = (1, 8, 32, 64),
    prompts: tuple[int, ...] = (512, 4096), rounds: int = 3, home: Path = Path("build/peers"),
) -> Iterator[Calls | str]:  # fmt: skip
    """This engine, vLLM, OpenVINO GenAI, llama.cpp and transformers on this machine's CPU, with SmolLM2-135M.

    Each peer is installed from the package index into an environment of its own in --home, at the first run
    (llama.cpp is compiled, which needs a C++ compiler). Prompts are random and the same for all; decoding is
    greedy and ignores the end of sequence. With adapters, request i uses adapter i % 8 of 8 random adapters
    of rank 16 on all linears; engines that cannot mix adapters in a batch (*) serve one adapter's requests
    after the other's. Below a table is how often an engine's first token is that of the first one. (With
    random prompts the two most likely tokens are sometimes almost equal.)
    """
    places = Places(home.absolute(), embedded_model_dir(None))
    places.home.mkdir(parents=True, exist_ok=True)
    plain = [*map(Work, requests), *(Work(1, length, 1) for length in prompts)]
    mixed = [Work(count, adapters=min(count, ADAPTERS)) for count in requests if count > 1]
    with random_adapters(str(places.model), ADAPTERS) as paths:
        for title, works, adapters in (
            ("Without adapters", plain, []),
            ("8 adapters", mixed, [*paths.values()]),
        ):
            first: dict[str, dict[str, list[int]]] = {}
            calls = {}
            for name in peers:
                for variant in PEERS[name].variants:
                    label = f"{variant} *" if adapters and not PEERS[name].mixes else variant
                    first[label] = {}
                    calls[label] = partial(visit, name, variant, places, adapters, works, first[label])
            yield Calls(title, calls, rounds, warm_up=0)
            yield agreement(first)


def visit(
    name: str, variant: str, places: Places, adapters: Sequence[Path], works: Sequence[Work],
    first: dict[str, list[int]],
) -> dict[str, float]:  # fmt: skip
    """Install and prepare a peer if need be, and run one of its variants."""
    peer, settings = PEERS[name], PEERS[name].variants[variant]
    python = environment(name, peer, places)
    given = [peer.adapter(places, path) for path in adapters]
    prepared = peer.prepare(places, python, settings.settings)
    log = places.home / f"{variant.replace(' ', '-')}.log"
    preload = {**settings.environment, "LD_PRELOAD": peer.preload(python)}
    values, said = run_worker(name, python, places.model, prepared, given, works, VOCABULARY, log, preload)
    first |= said
    return values


def agreement(first: Mapping[str, Mapping[str, Sequence[int]]]) -> str:
    """Return how often each engine's first tokens are those of the first one."""
    oracle, *_ = first.values()
    said = []
    for name, own in first.items():
        pairs = [
            pair for title in own if title in oracle for pair in zip(own[title], oracle[title], strict=True)
        ]
        if pairs:
            said.append(f"{name} {sum(a == b for a, b in pairs) / len(pairs):.0%}")
    return f"First tokens as those of the first: {', '.join(said)}.\n"


CASES = (beside_peers,)
