"""What a fleet costs, and what streams notice of losses."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator
from functools import partial
from itertools import pairwise

from benchmarks.fleet.servers import Server, client_of, first_token, served, stream, throughput
from benchmarks.runner import Calls

MODEL = "smollm2-135m"
LOSS_SECONDS = 90
"""Time after which a loss is given up."""


async def fleet(
    *, model: str = MODEL, streams: tuple[int, ...] = (8, 32), rounds: int = 3
) -> AsyncGenerator[Calls | str, None]:
    """A fleet of one replica beside one engine's own server, each with one thread."""
    with served(model) as plain, served(model, replicas=1) as fleet:
        servers = {"one engine": plain, "fleet of one": fleet}
        for count in streams:
            calls = {name: partial(throughput, server, count) for name, server in servers.items()}
            yield Calls(f"{count} streams", calls, rounds)
        calls = {name: partial(first_token, server) for name, server in servers.items()}
        yield Calls("Requests for one token", calls, rounds=50)
        yield f"starts: a fleet of one {fleet.start_seconds:.1f} s, one engine {plain.start_seconds:.1f} s"


async def losses(
    *, model: str = MODEL, streams: int = 64, tokens: int = 96, rounds: int = 1
) -> AsyncGenerator[Calls | str, None]:
    """What streams notice when one of two replicas is killed, or stopped so that it hangs."""
    with served(model, "--router", "least_loaded", replicas=2) as server:
        signals = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
        calls = {name: partial(loss, server, streams, tokens, number) for name, number in signals.items()}
        yield Calls(f"{streams} streams of {tokens} tokens", calls, rounds, warm_up=0)
        yield f"two replicas served after {server.start_seconds:.1f} s"
        yield f"no process is left {server.stop():.1f} s after SIGTERM"


async def loss(server: Server, streams: int, tokens: int, number: signal.Signals) -> dict[str, float]:
    """Send a signal to one of two replicas. The streams on it are recognized by their pauses: they are the
    half with the longer ones."""
    until = time.monotonic() + LOSS_SECONDS
    while len(server.replicas()) < 2 and time.monotonic() < until:  # noqa: ASYNC110 - the lost one comes back
        await asyncio.sleep(0.2)
    await asyncio.sleep(2)  # the gateway learns of it
    times: list[list[float]] = [[] for _ in range(streams)]
    async with client_of(server) as client:
        tasks = [asyncio.create_task(stream(client, i, tokens, times[i])) for i in range(streams)]
        while min(map(len, times)) < tokens // 5 and not any(task.done() for task in tasks):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        at, known = time.monotonic(), len(server.losses)
        os.kill(server.replicas()[0].pid, number)
        _, late = await asyncio.wait(tasks, timeout=LOSS_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # those that failed are not complete
    pauses = [
        max(
            [(later - before, later - at) for before, later in pairwise(each) if later > at],
            default=(0.0, 0.0),
        )
        for each in times
    ]
    moved = sorted(pauses)[streams // 2 :]
    return {
        "complete streams": sum(len(each) == tokens for each in times),
        "longest gap, s": max(gap for gap, _ in pauses),
        "noticed after, s": min(server.losses[known:], default=float("nan")) - at,
        "first goes on after, s": min(back for _, back in moved),
        "last, s": max(back for _, back in moved),
    }


CASES = (fleet, losses)
