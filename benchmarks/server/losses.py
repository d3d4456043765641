"""What streams notice when a fleet loses one replica after the other.

    python -m benchmarks.server.losses [--rounds 10] [--streams 64] [--tokens 60] [--step-ms 100]

A fleet of two replicas that have no model (``stub_replica.py``): so a round takes only seconds, and what is
measured is the door, Ray Serve, and the way between them. In each round clients stream through the door, and
after two seconds one of the replicas gets SIGKILL, in turns. Prints how many streams were complete, and the
longest time between two tokens of one stream; asserts nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import pairwise

import httpx

from benchmarks.server.door import ROOT, STUB
from benchmarks.server.fleet import Server, stream
from benchmarks.server.stub_replica import STEP_VARIABLE
from benchmarks.shared.report import arguments

KILL_SECONDS = 2.0
GIVE_UP_SECONDS = 60.0


async def loss(server: Server, victim: int, streams: int, tokens: int) -> tuple[int, float]:
    """Return the number of complete streams, and the longest gap in seconds."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600, trust_env=False) as client:
        times: list[list[float]] = [[] for _ in range(streams)]
        tasks = [asyncio.create_task(stream(client, i, tokens, times[i])) for i in range(streams)]
        await asyncio.sleep(KILL_SECONDS)
        os.kill(server.replicas()[victim].pid, signal.SIGKILL)
        _, late = await asyncio.wait(tasks, timeout=GIVE_UP_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # those that failed are not complete
        gaps = [later - earlier for each in times for earlier, later in pairwise(each)]
        return sum(len(each) == tokens for each in times), max(gaps, default=0.0)


def both_there(server: Server) -> bool:
    """Wait until there are two replicas, and return whether there are."""
    until = time.monotonic() + GIVE_UP_SECONDS
    while len(server.replicas()) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(KILL_SECONDS)  # the door and Serve learn of the new one
    return len(server.replicas()) == 2


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--step-ms", type=float, default=100.0)
    given = parser.parse_args()
    os.environ[STEP_VARIABLE] = str(given.step_ms / 1e3)
    os.environ["PYTHONPATH"] = str(ROOT)
    flags = ("--served-model-name", "m", "--replicas", "2", "--router", "least_loaded")
    server = Server(given.model, *flags, program=STUB)
    try:
        print("| loss | complete streams | longest gap, s |\n|---|---|---|")
        for number in range(given.rounds):
            if not both_there(server):
                print("the replica that was killed did not come back")
                break
            whole, gap = asyncio.run(loss(server, number % 2, given.streams, given.tokens))
            print(f"| {number + 1} | {whole} of {given.streams} | {gap:.2f} |", flush=True)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
