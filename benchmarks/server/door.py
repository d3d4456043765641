"""Cost of a fleet's door by itself: a fleet of one replica that has no model and answers at once.

    python -m benchmarks.server.door [--streams 1 8 32 128] [--step-ms 25] [--tokens 400] [--rounds 3]

Prints, for so many streams (HTTP, server-sent events, a token each step): tokens per second, the processor
time of the door's process for each token, all of its threads and HTTP included, and that of the replica's;
then the time from a request to its first token, one request after the other, and the door's processor time
in a second without requests. The tokenizer is the model's, and nothing else of it is read. Prints medians;
asserts nothing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path

import httpx
import psutil

from benchmarks.server.fleet import Server, load
from benchmarks.server.stub_replica import STEP_VARIABLE
from benchmarks.shared.report import arguments, percentile

ROOT = Path(__file__).parents[2]
STUB = ("-c", "from benchmarks.server.stub_replica import serve; serve()")


def used(process: psutil.Process) -> float:
    """Return the processor seconds of all its threads so far."""
    return sum(process.cpu_times()[:2])


def streams(server: Server, count: int, tokens: int) -> tuple[float, float, float]:
    """Return tokens per second, and the microseconds of the door and of the replica for each."""
    [replica] = server.replicas()
    door_before, replica_before, began = used(server.own), used(replica), time.monotonic()
    asyncio.run(load(server.url, count, tokens))
    seconds, made = time.monotonic() - began, count * tokens
    return (
        made / seconds,
        1e6 * (used(server.own) - door_before) / made,
        1e6 * (used(replica) - replica_before) / made,
    )


def first_tokens(server: Server, count: int = 300) -> list[float]:
    """Return the seconds of requests for one token each."""
    body = {"model": "m", "prompt": [1000, 1001], "max_tokens": 1, "temperature": 0}
    took = []
    with httpx.Client(trust_env=False) as client:
        for _ in range(count):
            began = time.perf_counter()
            client.post(f"{server.url}/v1/completions", json=body).raise_for_status()
            took.append(time.perf_counter() - began)
    return took


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ[STEP_VARIABLE] = str(given.step_ms / 1e3)
    os.environ["PYTHONPATH"] = str(ROOT)
    server = Server(given.model, "--served-model-name", "m", "--replicas", "1", program=STUB)
    try:
        first_tokens(server, 20)
        print("| streams | tokens/s | us/token in the door | in the replica |\n|---|---|---|---|")
        for count in given.streams:
            rounds = [streams(server, count, given.tokens) for _ in range(given.rounds)]
            rate, door, replica = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"| {count} | {rate:.0f} | {door:.0f} | {replica:.0f} |", flush=True)
        took = first_tokens(server)
        p50, p99 = (1e3 * percentile(took, share) for share in (0.5, 0.99))
        print(f"first token after {p50:.2f} ms (p50), {p99:.2f} ms (p99)", flush=True)
        before = used(server.own)
        time.sleep(5)
        print(f"without requests the door takes {1e3 * (used(server.own) - before) / 5:.1f} ms a second")
    finally:
        server.stop()


if __name__ == "__main__":
    main()
