"""The same work by this engine, vLLM, OpenVINO GenAI, llama.cpp and transformers, on this machine's CPU.

    python -m benchmarks.beside_peers
    python -m benchmarks.beside_peers --write docs/performance.md
    python -m benchmarks.beside_peers --peers aioengine llama_cpp openvino --rounds 1

Each peer is installed from the package index into an environment of its own in --home, at the first run
(benchmarks/peers/environments.py lists them; llama.cpp is compiled, which needs a C++ compiler). The model is
SmolLM2-135M. Prompts are random and the same for all; decoding is greedy and ignores the end of sequence.
With adapters, request i uses adapter i % 8 of 8 random adapters of rank 16 on all seven linears. Engines that
cannot mix adapters in a batch serve the requests of one adapter after those of another.

A round starts the engines one after the other, warms each up with the same prompts, and times each work once.
Every other round has the reverse order. Prints a Markdown table with medians of the rounds, and half the
distance between the fastest and the slowest, in percent. Below the table it prints how often an engine's
first token is that of transformers. (With random prompts, the two most likely tokens are sometimes almost
equal.)
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.model.files.embedded import embedded_model_dir
from aioengine.model.files.resolve import read_spec
from benchmarks.peers.environments import PEERS, Peer, PeerFailed, Places, Variant, environment, run_logged
from benchmarks.shared.engines import random_prompts, write_adapters
from benchmarks.shared.report import arguments, cpu_name

WORKERS = Path(__file__).parent / "peers"
ADAPTERS, RANK = 8, 16
BEGIN, END = "<!-- beside_peers: begin -->", "<!-- beside_peers: end -->"


class Work(NamedTuple):
    """One column of the table: ``requests`` at once, each of ``prompt`` and ``output`` tokens."""

    title: str
    requests: int
    prompt: int = 128
    output: int = 64
    adapters: int = 0

    def value(self, seconds: float) -> float:
        """Output tokens per second; or milliseconds to the first token, if only one is generated."""
        return 1000 * seconds if self.output == 1 else self.requests * self.output / seconds

    def case(self, vocabulary: int) -> dict[str, Any]:
        """Return a worker's job. Its prompts depend on the work only."""
        rng = random.Random(f"{self.requests} {self.prompt}")
        prompts = random_prompts(vocabulary, self.requests, self.prompt, rng)
        using = [i % self.adapters if self.adapters else None for i in range(self.requests)]
        return {"name": self.title, "prompts": prompts, "output": self.output, "adapters": using}


def works(requests: Sequence[int]) -> list[Work]:
    """The columns for these numbers of requests at once."""
    found = [Work(f"{n}", n) for n in requests]
    found += [Work(f"{n} with adapters", n, adapters=min(n, ADAPTERS)) for n in requests if n > 1]
    return [*found, Work("first of 512, ms", 1, 512, 1)]


class Found(NamedTuple):
    """Results of one engine in all rounds."""

    version: str
    seconds: dict[str, list[float]]
    first: dict[str, list[int]]


def visit(
    peer: Peer, variant: Variant, places: Places, adapters: Sequence[Path], cases: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Start the engine, let it do each work once, and end it. Raises PeerFailed."""
    python = environment(peer, places)
    job = {
        "model": str(places.model),
        "settings": peer.prepare(places, python, variant),
        "adapters": [str(path) for path in adapters],
        "cases": cases,
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        log = places.home / f"{variant.name.replace(' ', '-')}.log"
        command = [str(python), str(WORKERS / f"run_{peer.name}.py"), str(result)]
        run_logged(
            command,
            log,
            {**os.environ, "LD_PRELOAD": peer.preload(python)},
            text=json.dumps(job),
            cwd=Path(folder),
        )
        answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return answer


def table(found: dict[str, Found], columns: Sequence[Work], how: dict[str, str]) -> str:
    """Return the results as Markdown. ``how`` says how each engine serves adapters."""
    titles = [work.title for work in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, one in found.items():
        cells = []
        for work in columns:
            values = [work.value(seconds) for seconds in one.seconds.get(work.title, [])]
            if not values:
                cells.append("")
                continue
            median = statistics.median(values)
            spread = (max(values) - min(values)) / 2 / median
            mark = "*" if work.adapters and how[name] == "in turn" else ""
            cells.append(f"{median:.{0 if median >= 100 else 1}f}{mark} ±{spread:.0%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement(found: dict[str, Found], oracle: str) -> str:
    """Return how often each engine's first tokens are the oracle's, without and with adapters."""
    said = []
    for name, one in found.items():
        shares = []
        for lora in (False, True):
            pairs = [
                pair
                for title in one.first
                if ("adapters" in title) == lora and title in found[oracle].first
                for pair in zip(one.first[title], found[oracle].first[title], strict=True)
            ]
            if pairs:
                shares.append(f"{sum(a == b for a, b in pairs) / len(pairs):.0%}")
        said.append(f"{name} {' and '.join(shares)}")
    return ", ".join(said)


def put_between(text: str, content: str) -> str:
    """Return ``text`` with the part between the marks replaced. Raises ValueError if it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END} in the file to write to")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def measure(
    columns: Sequence[Work], rounds: int, places: Places, peers: Sequence[Peer]
) -> tuple[dict[str, Found], set[str]]:
    """Run all rounds. Also returns the names of the engines that failed; later rounds leave these out."""
    found: dict[str, Found] = {}
    failed: set[str] = set()
    spec = read_spec(places.model)
    with tempfile.TemporaryDirectory() as folder:
        plain = write_adapters(Path(folder), spec, ADAPTERS, RANK).values()
        converted = {peer.name: [peer.adapter(places, path) for path in plain] for peer in peers}
        engines = [(peer, variant) for peer in peers for variant in peer.variants]
        entries = [(*engine, lora) for engine in engines for lora in (False, True)]
        for turn in range(rounds):
            for peer, variant, lora in entries if turn % 2 == 0 else reversed(entries):
                cases = [work.case(spec.vocab_size) for work in columns if bool(work.adapters) == lora]
                if variant.name in failed or not cases or (lora and not variant.adapters):
                    continue
                start = time.monotonic()
                try:
                    answer = visit(peer, variant, places, converted[peer.name] if lora else [], cases)
                except PeerFailed as e:
                    failed.add(variant.name)
                    print(f"{variant.name} failed: {e}", file=sys.stderr, flush=True)
                    continue
                one = found.setdefault(variant.name, Found(answer["version"], {}, {}))
                for title, seconds in answer["seconds"].items():
                    one.seconds.setdefault(title, []).append(seconds)
                one.first.update(answer["first"])
                took = time.monotonic() - start
                what = "with adapters" if lora else "without adapters"
                print(f"round {turn + 1}: {variant.name} {what}, {took:.0f} s", file=sys.stderr, flush=True)
    return found, failed


def main() -> int:
    parser = arguments(__doc__)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 64], help="how many at once")
    parser.add_argument("--home", type=Path, default=Path("build/peers"), help="for environments and models")
    parser.add_argument("--write", type=Path, help="a Markdown file, where the table goes between two marks")
    args = parser.parse_args()
    places = Places(args.home.absolute(), embedded_model_dir(None))
    places.home.mkdir(parents=True, exist_ok=True)
    chosen = [peer for peer in PEERS if peer.name in args.peers]
    columns = works(args.requests)
    found, failed = measure(columns, args.rounds, places, chosen)
    if not found:
        return 1
    how = {variant.name: variant.adapters for peer in PEERS for variant in peer.variants}
    order = [variant.name for peer in PEERS for variant in peer.variants]
    found = {name: found[name] for name in order if name in found}
    oracle = "transformers bf16" if "transformers bf16" in found else next(iter(found))
    versions = "; ".join(f"{name}: {one.version}" for name, one in found.items())
    text = f"""{table(found, columns, how)}

Rounds: {args.rounds}, on {len(os.sched_getaffinity(0))} cores of {cpu_name()}; \
load when it ended: {os.getloadavg()[2]:.1f}. * One adapter's requests after the other's.
First tokens as those of {oracle}, without and with adapters: {agreement(found, oracle)}.
Versions: {versions}."""
    print(text)
    (places.home / "results.json").write_text(
        json.dumps({name: one._asdict() for name, one in found.items()}, indent=1), encoding="utf-8"
    )
    if args.write:
        old = args.write.read_text(encoding="utf-8")
        args.write.write_text(put_between(old, text), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
