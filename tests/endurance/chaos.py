"""Fate of requests when the machine fails.

While a client streams from a server with a tiny model, the machine fails in several ways, one after the
other. Prints a Markdown table: the failure, the longest time that the client waited for its next token, and
what happened.

    make chaos
    make chaos ARGS="--only clock disk"

The exit status is 1 if anything happened that should not. Failures that need a missing tool (libfaketime, a C
compiler) are left out, and the table says so. Needs tests/ on the path.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import httpx
from endurance.target import Target, served
from support.process_harness import worker_pids

GAP = 1.0
"""Maximum seconds that the client may wait for a token, if the model's process lives."""
LINES = 2400
SLOW = "adapter-5"
SLOW_SECONDS = 2
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


class Client:
    """A client that streams one completion after the other; ``gaps`` are the seconds between its tokens."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.was_cut = asyncio.Event()
        """Whether a stream has ended with an error."""


@contextlib.asynccontextmanager
async def streaming(target: Target) -> AsyncIterator[Client]:
    client = Client()

    async def stream() -> None:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "stream": True}
        while True:
            before = time.monotonic()
            async with target.http.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        now = time.monotonic()
                        client.gaps.append(now - before)
                        before = now
                        if '"error"' in line:
                            client.was_cut.set()

    task = asyncio.create_task(stream())
    try:
        while len(client.gaps) < 5:
            await asyncio.sleep(0.01)
            if task.done():
                task.result()
        client.gaps.clear()
        yield client
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
            await task


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


async def kill_the_worker(target: Target, client: Client) -> str:
    """Kill the model's process: running requests fail, waiting ones go on, and it is started again."""
    for pid in worker_pids(target.served.process.pid):
        os.kill(pid, signal.SIGKILL)
    answer = await target.complete()
    await client.was_cut.wait()
    expect(answer.status_code in (200, 503), f"a new request got {answer.status_code}")
    again = await target.complete()
    expect(again.status_code == 200, f"after the restart a request got {again.status_code}")
    restarts = await target.metric("aioengine_executor_restarts_total")
    expect(restarts == 1, f"{restarts:.0f} restarts were counted")
    return "the stream ended with an error, new requests were answered after the restart"


async def full_disk(target: Target, client: Client) -> str:
    """Record to /dev/full from the start, so that every write fails."""
    statuses = [(await target.complete()).status_code for _ in range(40)]
    expect(set(statuses) == {200}, f"requests got {set(statuses)}")
    said = [line for line in target.served.lines if "recording to /dev/full has ended" in line["message"]]
    expect(len(said) == 1, f"the log says {len(said)} times that the recording has ended")
    return "all requests were answered; the recording ended, and the log says so"


async def adapter_root_gone(target: Target, client: Client) -> str:
    expect((await target.complete("adapter-0")).status_code == 200, "adapter-0 is not served")
    away = target.root.rename(target.root.with_name("away"))
    cached, cold = await target.complete("adapter-0"), await target.complete("adapter-1")
    expect(cached.status_code == 200, f"a cached adapter got {cached.status_code}")
    expect(cold.status_code == 503, f"a cold adapter got {cold.status_code}")
    failures = await target.metric("aioengine_lora_resolver_failures_total", reason="io")
    expect(failures >= 1, "nothing counted the failure")
    away.rename(target.root)
    healed = (await target.complete("adapter-1")).status_code
    expect(healed == 200, f"when it was back the cold adapter got {healed}")
    return "cached adapters were served, cold ones got 503; healed when it was back"


async def slow_disk(target: Target, client: Client) -> str:
    """Make opening one adapter's files take seconds; other adapters must not wait for it."""
    began = time.monotonic()
    slow = asyncio.create_task(target.complete(SLOW))
    await asyncio.sleep(0.1)
    other = await target.complete("adapter-2")
    first = time.monotonic() - began
    answer = await slow
    took = time.monotonic() - began
    expect(other.status_code == answer.status_code == 200, f"{other.status_code}, {answer.status_code}")
    expect(took >= SLOW_SECONDS, f"it took {took:.1f} s only: the disk was not slow")
    expect(first < SLOW_SECONDS, f"another adapter waited {first:.1f} s")
    return f"its request took {took:.1f} s, another adapter's {first:.1f} s"


async def clock_jumps(target: Target, client: Client) -> str:
    """Set the clock an hour ahead, then three back, while requests run. Durations must not change."""

    def hours() -> set[str]:
        return {str(line["time"])[:13] for line in target.served.lines if "time" in line}

    for jump in ("+3600", "-7200", "+0"):
        before = hours()
        set_clock(target.root.parent, jump)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                while True:  # the log is written and read beside the requests
                    answer = await target.complete()
                    expect(answer.status_code == 200, f"a request got {answer.status_code} after {jump} s")
                    await asyncio.sleep(0.1)
                    if jump == "+0" or hours() > before:
                        break
    expect(len(hours()) >= 3, f"the log's clock did not jump: {sorted(hours())}")
    longest = await target.metric("aioengine_request_e2e_seconds_sum")
    expect(0 < longest < 600, f"requests are said to have taken {longest:.0f} s in all")
    return "requests ran on, and their durations are right; the log's times jump"


async def unread_log(target: Target, client: Client) -> str:
    """Stop reading standard error for a while: first the pipe is full, then the lines kept in memory."""
    name, headers = "n" * 150, {"x-request-id": "i" * 128}  # a line of the log has a kilobyte

    async def refused() -> int:
        body = {"model": name, "prompt": "Hi"}
        return (await target.http.post("/v1/completions", json=body, headers=headers)).status_code

    with target.served.unread():
        for _ in range(LINES // 32):
            statuses = set(await asyncio.gather(*[refused() for _ in range(32)]))
            expect(statuses == {404}, f"requests got {statuses}")
        expect((await target.complete()).status_code == 200, "a request failed")
        health = await target.http.get("/health")
        dropped = await target.metric("aioengine_log_dropped_total")
    expect(health.status_code == 200, f"/health is {health.status_code}")
    expect(dropped > 0, "no lost line was counted")
    return f"{LINES} requests were answered; {dropped:.0f} lost lines were counted"


class Fault(NamedTuple):
    name: str
    run: Callable[[Target, Client], Awaitable[str]]
    gap: float = GAP
    missing: Callable[[], str | None] = lambda: None


def set_clock(folder: Path, offset: str) -> Path:
    """Write it atomically: libfaketime ends the process if it reads half of the file."""
    new = folder / "clock.new"
    new.write_text(offset)
    return new.rename(folder / "clock")


def no_faketime() -> str | None:
    return None if FAKETIME.exists() else "needs libfaketime (Debian: faketime)"


def no_compiler() -> str | None:
    return None if shutil.which("cc") else "needs a C compiler"


FAULTS = [
    Fault("adapter root removed, and put back", adapter_root_gone),
    Fault(f"disk slow: {SLOW_SECONDS} s for an adapter's files", slow_disk, missing=no_compiler),
    Fault("wall clock +1 h, then -3 h", clock_jumps, missing=no_faketime),
    Fault("disk full: --record /dev/full", full_disk),
    Fault("the model's process killed", kill_the_worker, gap=60.0),
    Fault("standard error that nobody reads, and a flood", unread_log, gap=5.0),
]
SLOW_OPEN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>
static int slowly(const char *name, int folder, const char *path, int flags, int mode) {
  if (path && strstr(path, "adapter_model")) {
    char link[64], where[4096] = "";
    if (folder != AT_FDCWD) {
      __builtin_snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t n = readlink(link, where, sizeof where - 1);
      if (n > 0) where[n] = 0;
    }
    if (strstr(path, SLOW) || strstr(where, SLOW)) sleep(SECONDS);
  }
  int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, name);
  return real(folder, path, flags, mode);
}
#define MODE va_list l; va_start(l, flags); int mode = va_arg(l, int); va_end(l);
int open(const char *p, int flags, ...) { MODE return slowly("openat", AT_FDCWD, p, flags, mode); }
int open64(const char *p, int flags, ...) { MODE return slowly("openat64", AT_FDCWD, p, flags, mode); }
int openat(int d, const char *p, int flags, ...) { MODE return slowly("openat", d, p, flags, mode); }
int openat64(int d, const char *p, int flags, ...) { MODE return slowly("openat64", d, p, flags, mode); }
"""
"""Source of a library to preload, which delays the opening of one adapter's weights as a slow disk does."""


def preloads(folder: Path) -> dict[str, str]:
    """Return the environment in which the disk can be slow, and the clock can jump."""
    libraries = []
    environment: dict[str, str] = {}
    if no_compiler() is None:
        source, made = folder / "slow.c", folder / "slow.so"
        source.write_text(SLOW_OPEN)
        defines = [f'-DSLOW="{SLOW}"', f"-DSECONDS={SLOW_SECONDS}"]
        command = ["cc", "-shared", "-fPIC", "-O1", "-w", *defines, str(source), "-o", str(made), "-ldl"]
        subprocess.run(command, check=True)
        libraries.append(str(made))
    if no_faketime() is None:
        clock = set_clock(folder, "+0")
        libraries.append(str(FAKETIME))
        environment |= {
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }
    return {**environment, "LD_PRELOAD": " ".join(libraries)} if libraries else environment


async def chaos(only: list[str]) -> list[str]:
    """Return what is wrong."""
    wrong = []
    print("| fault | longest gap, s | what happened |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--executor", "process", "--restart", "on-failure", "--record", "/dev/full")
        async with served(Path(folder), *flags, **preloads(Path(folder))) as target:
            for fault in FAULTS:
                if not any(word.lower() in fault.name.lower() for word in only):
                    continue
                missing = fault.missing()
                if missing is not None:
                    print(f"| {fault.name} | | left out: {missing} |", flush=True)
                    continue
                said, gap = await tried(fault, target, wrong)
                print(f"| {fault.name} | {gap:.2f} | {said} |", flush=True)
            if target.served.process.returncode is not None:
                wrong.append("the server has ended")
    return wrong


async def tried(fault: Fault, target: Target, wrong: list[str]) -> tuple[str, float]:
    gap = float("nan")
    try:
        async with asyncio.timeout(60), streaming(target) as client:
            said = await fault.run(target, client)
            gap = max(client.gaps, default=gap)
        expect(gap <= fault.gap, f"the client waited {gap:.2f} s")
    except (AssertionError, TimeoutError, httpx.HTTPError, json.JSONDecodeError) as error:
        said = f"WRONG: {type(error).__name__} {error}".rstrip()
        wrong.append(f"{fault.name}: {said}")
    return said, gap


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="faults with one of these words in the name")
    wrong = asyncio.run(chaos(parser.parse_args().only))
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
