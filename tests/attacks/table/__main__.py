"""How harmful requests and adapter folders affect another client, the bystander.

A real server (SmolLM2-135M) is started and attacked, while the bystander streams greedy completions of one
prompt. Prints a Markdown table: the largest gap and the 99th percentile of gaps between two events of the
bystander, the server's answers to the attacker, and the memory that the server and its children took.
"before" are the values at commit e05b9fa, which had no protection. The last line has the time that it took,
and the longest time for which the server's event loop was held: processor time, which does not grow with
what else runs on the machine, as gaps do. (The attack "nothing" has the gaps that are the machine's own.)

    make attack
    make attack ARGS="--only grammar prompt"

The exit status is 1 if the bystander waited for more than a second or got another text, or if the server
ended, held its event loop for too long or took more memory than this attack may take. Needs tests/ on the
path, for the bystander.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import httpx
import psutil
from attacks.table import connections, folders, requests
from attacks.table.target import MODEL, Target, attacked
from support.bystander import bystander, forget_peak, memory

LARGEST_GAP = 1.0
"""Seconds."""
LONGEST_HOLD = 0.5
"""Seconds of processor time that the server's event loop may spend on one thing."""
STRANGER = "127.0.0.2"
"""The bystander's address. Without keys, clients are told apart by their addresses."""
KEYS = ("--api-key", "a:key-of-a", "--api-key", "b:key-of-b", "--admin-key", "ops:key-of-ops")
AFTERWARDS = 0.5
"""Seconds after the attack that still count."""


class Attack(NamedTuple):
    name: str
    run: Callable[[Target], Awaitable[str]]
    before: str = "not measured"
    memory: int = 400
    """MiB that the server may take."""
    keys: bool = False
    """Whether the server has keys, of tenants a and b."""
    template: str | None = None
    """A chat template to use in place of the model's."""


ATTACKS = [
    Attack("nothing, for a second", requests.nothing, ""),
    Attack("A1 JSON schema of 1,000 levels (75 KB)", requests.deep_schema, "process ends with SIGSEGV"),
    Attack("A1 Lark grammar, 3,000 rules deep (37 KB)", requests.deep_rules, "process ends with SIGSEGV"),
    Attack(
        "A1 8 automaton products, then chat, /metrics, ...",
        requests.slow_compiles,
        "no answers for minutes, +3.9 GB",
        memory=1100,
    ),
    Attack("A1 JSON schema of 9,000 properties", requests.many_properties, "compiles for 11.5 s"),
    Attack("A2 one ambiguous grammar", requests.ambiguous, "595 ms, p99 474 ms"),
    Attack("A2 twenty worse ones", requests.twenty_ambiguous, "1,485 ms, p99 640 ms", memory=1100),
    Attack("A3 prompt of 7 MB", requests.long_text, "16,276 ms"),
    Attack("A3 chat of 270,000 messages", requests.many_messages, "12,786 ms"),
    Attack("A3 /detokenize of 2 M ids", requests.detokenize, "900 ms"),
    Attack("A4 `metadata` of 2.6 M lists", requests.nested_metadata, "3,337 ms"),
    Attack("A4 the same as a schema", requests.nested_schema, "4,205 ms"),
    Attack("A4 prompt of 4 M ids", requests.many_ids, "870 ms"),
    Attack("A4 10 streams with 1 M ignored objects each", requests.ignored_fields, "+596 MB", memory=200),
    Attack("A4 2.6 M lists in the arguments of a call", requests.lists_in_arguments, "5,860 ms, when busy"),
    Attack("A4 200,000 log-probabilities", requests.many_logprobs, "1,324 ms, when busy"),
    Attack("A4 2 x 257,250 log-probabilities of prompts", requests.scored_prompts),
    Attack("A4 bodies full of small values, of each kind", requests.odd_bodies),
    Attack("A4 tools, choices, names, ... by the thousand", requests.many_parts),
    Attack("A4 integers of 6,000 digits", requests.large_integers, "400"),
    Attack("A4 2 x 16 choices, all lists as long as may be", requests.all_fields),
    Attack("A4 64 choices at temperature 2", requests.hot_choices),
    Attack("A4 64 long answers of one address", requests.long_answers),
    Attack("A7 256 vectors in one request", requests.many_vectors, "15,990 ms, when busy"),
    Attack("A7 2 x 2,048 vectors", requests.many_inputs, "held 684 ms (8 x 2,048)"),
    Attack("A7 2,048 documents to be ranked", requests.many_documents),
    Attack("A7 300 mixes of adapters", requests.many_mixes),
    Attack("A5 30 x 13,900 pipelined requests", connections.pipelined, "5,501 ms; /health in 20.6 s"),
    Attack("A6 150 bodies that stop short of 8 MB", connections.bodies_in_flight, "+1,082 MB"),
    Attack(
        "A7 1,500 requests of another tenant",
        requests.tenant_flood,
        "429 at once for b, each time",
        keys=True,
    ),
    Attack("A7 the same from another address, without keys", requests.address_flood),
    Attack("A8 prompt of 8,000 tokens", requests.long_prompt, "4,900 ms"),
    Attack("A9 what has another tenant sent?", requests.cache_guesses, "cached_tokens 32", keys=True),
    Attack("A9 300 prompts with salts of their own", requests.unique_salts, memory=1100),
    Attack("A10 where are the adapters?", requests.paths_of_models, "absolute paths"),
    Attack("A10 500 wrong keys", requests.wrong_keys, "401 and a log line each", keys=True),
    Attack("A10b log that nobody reads", requests.log_unread, "no answers after request 178"),
    Attack("A11 streams begun and cut off, 60 at a time", connections.streams_cut_off),
    Attack("A11 30 connections whose requests are refused", connections.refused_requests),
    Attack("A11 1,500 connections at once, each asks", connections.many_connections),
    Attack("A11 2,000 connections that ask and do not send", connections.asked_before_sent),
    Attack("A11 10 bodies of 200,000 chunks of a byte", connections.tiny_chunks),
    Attack("A11 128 choices in a stream, cut off, 20 at a time", connections.many_choices),
    Attack("A11 header lines of 60 KB, of each name", connections.long_headers),
    Attack("A11 400 streams that nobody reads", connections.unread_streams, memory=300),
    Attack("A14 lists of 10,000 names, and of all series", connections.lists, "held about 150 ms"),
    Attack(
        "A12 chat template that goes through messages twice",
        requests.quadratic_chat,
        template=requests.QUADRATIC,
    ),
    Attack("B11 backtracking pattern in a config", folders.patterns, "for ever"),
    Attack("B12 tensor of 40,000 dimensions (0.8 MB)", folders.many_dimensions, "5,596 ms"),
    Attack("B14 8 GB behind a known header", folders.longer_than_its_header, "200 after 23.6 s, +8.2 GB"),
    Attack("B14 half of a file with a known header", folders.half_a_file, '503 "unexpected RuntimeError"'),
    Attack("B15 config of 4 MB", folders.large_config, "1,618 ms"),
    Attack("B16 tensor of 2,000,001 dimensions", folders.many_empty_dimensions, "400, 6,000,299 bytes"),
    Attack("B17 file swapped with a pipe", folders.pipe, "no answer"),
]


class Peak:
    """Largest memory of the server and its children, minus their memory before."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        forget_peak(pid)
        self._begin = memory(pid) + self._children()
        self._most = 0

    def _children(self) -> int:
        total = 0
        for child in psutil.Process(self._pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += child.memory_full_info().uss
        return total

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            self._most = max(self._most, memory(self._pid) + self._children())

    def grown(self) -> int:
        return max(self._most, memory(self._pid, "VmHWM") + self._children(), self._begin) - self._begin


async def row(attack: Attack, target: Target) -> tuple[str, str, float]:
    """Return its row of the table, what is wrong, and for how long the event loop was held."""
    peak = Peak(target.served.process.pid)
    target.held.take()
    watching = asyncio.create_task(peak.watch())
    wrong, held = "", 0.0
    try:
        stranger = bystander(target.served.url, model=MODEL, key="key-of-b", max_tokens=40, address=STRANGER)
        async with stranger as seen:
            try:
                async with asyncio.timeout(60):
                    answer = await attack.run(target)
                await asyncio.sleep(AFTERWARDS)
            except (httpx.HTTPError, OSError, TimeoutError) as error:
                answer = wrong = f"no answer: {error!r}"
        held = target.held.take().busy
        seen.check(LARGEST_GAP)
        assert held < LONGEST_HOLD, "the event loop was held"
    except (AssertionError, OSError, ValueError) as error:
        wrong = str(error)
    watching.cancel()
    gaps = sorted(seen.gaps) or [math.nan]
    grown = peak.grown() / 2**20
    if grown > attack.memory:
        wrong = f"took {grown:.0f} MiB"
    cells = f"{gaps[-1] * 1e3:,.0f}", f"{gaps[len(gaps) * 99 // 100] * 1e3:,.0f}", answer, f"{grown:,.0f}"
    return f"| {attack.name} | {attack.before} | {' | '.join(cells)} |", wrong, held


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="attacks with one of these words in the name")
    only = parser.parse_args().only
    wanted = [a for a in ATTACKS if any(word.lower() in a.name.lower() for word in only)]
    print("| attack | before | largest gap, ms | p99, ms | answer | memory, MiB |\n|---|---|---|---|---|---|")
    failures: list[str] = []
    holds: list[tuple[float, str]] = []
    began = time.monotonic()
    for keys, template in dict.fromkeys((attack.keys, attack.template) for attack in wanted):
        flags = KEYS if keys else ()
        attacks = [attack for attack in wanted if (attack.keys, attack.template) == (keys, template)]
        async with attacked(*flags, template=template) as found:
            await found.ask(structured_outputs={"regex": "warm"})
            for attack in attacks:
                line, wrong, held = await row(attack, found)
                print(line, flush=True)
                holds.append((held, attack.name))
                if wrong:
                    failures.append(f"{attack.name}: {wrong}")
                if found.served.process.returncode is not None:
                    failures.append(f"{attack.name}: the server ended")
                    break
    held, name = max(holds)
    took = time.monotonic() - began
    print(f"\nThis took {took:.0f} s. The event loop was held for at most {held * 1e3:.0f} ms ({name}).")
    print(*failures, sep="\n", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
