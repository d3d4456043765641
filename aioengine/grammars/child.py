"""A child of the zygote: one grammar, and the parsers of all requests that have it.

Its grammar may kill it at any time, by exceeding processor time (SIGPROF), memory (SIGABRT) or stack
(SIGSEGV).
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time
from array import array
from io import BufferedReader
from typing import NamedTuple, NoReturn

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from aioengine.grammars.wire import AFRESH, ASK, COMPILED, FORGET, LENGTH, MASK

STACK = 64 * 2**20
"""Stack size in bytes. The compiler is recursive; a thousand levels of a JSON schema take about 8 MiB."""
OVERHEAD = STACK + 64 * 2**20
"""Bytes of address space that any thread takes: its stack and its malloc arena."""
SLOW_SECONDS = 0.005
SLOW_MASKS = 4
"""A grammar whose masks took longer than this on average, over at least this many, lowers its priority."""
GIVES_WAY = 19
MEASURE_SECONDS = 0.5
"""Minimum time between two measurements of the memory."""
MAX_FORCED = 31
"""Maximum forced tokens in an answer. A step computes all of them, while other requests' tokens wait."""
FORCING_SECONDS = 0.003
"""Processor time in which forced tokens are looked for."""

MAX_REASON = 2000
"""Maximum characters of a reason."""


class Limits(NamedTuple):
    compile_seconds: float
    mask_seconds: float
    memory: int
    nice: int


def run(
    connection: socket.socket, tokenizer: LLTokenizer, shared: mmap.mmap, width: int, limits: Limits
) -> NoReturn:
    """Serve until the engine is gone. ``shared`` has places for masks of ``width`` bytes each."""
    _silence()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    memory = _Memory()
    memory.limit(limits.memory + OVERHEAD)
    requests = connection.makefile("rb")
    head = requests.read(LENGTH.size)
    if len(head) == LENGTH.size:
        text = requests.read(*LENGTH.unpack(head)).decode()
        signal.setitimer(signal.ITIMER_PROF, limits.compile_seconds)
        matcher = _compile(tokenizer, text, limits.nice)
        signal.setitimer(signal.ITIMER_PROF, 0)
        why = _reason(matcher) if matcher.is_error() else ""
        data = why.encode()
        connection.sendall(
            COMPILED.pack(not data, memory.measure()) + LENGTH.pack(len(data)) + data,
        )
        if not why:
            _Masks(connection, matcher, shared, width, limits.mask_seconds, memory).serve(requests)
    os._exit(0)


def _compile(tokenizer: LLTokenizer, text: str, nice: int) -> LLMatcher:
    """Compile in a thread, which can have a large stack. On Linux only this thread becomes nicer."""
    found: list[LLMatcher] = []

    def work() -> None:
        if sys.platform == "linux":
            os.nice(nice)  # nicer than the engine
        # Measured with ambiguous grammars; the properties of an object need items of a row.
        limits = LLParserLimits(step_max_items=5_000, step_lexer_fuel=50_000, verbose_errors=False)
        found.append(LLMatcher(tokenizer, text, log_level=0, limits=limits))

    threading.stack_size(STACK)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


class _Masks:
    def __init__(
        self,
        connection: socket.socket,
        matcher: LLMatcher,
        shared: mmap.mmap,
        width: int,
        seconds: float,
        memory: _Memory,
    ) -> None:
        self._connection = connection
        self._matcher = matcher
        self._shared = shared
        self._width = width
        self._seconds = seconds
        self._memory = memory
        self._rows: dict[int, LLMatcher] = {}
        self._count = 0
        self._spent = 0.0
        self._is_nice = False

    def serve(self, requests: BufferedReader) -> None:
        """Answer requests for masks until the engine is gone."""
        while len(head := requests.read(ASK.size)) == ASK.size:
            what, row, number, place, count = ASK.unpack(head)
            tokens = array("i", requests.read(4 * count))
            if what == FORGET:
                self._rows.pop(row, None)
                continue
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, self._seconds)
            mask, why = self._mask(row, tokens, afresh=what == AFRESH)
            forced = _forced(self._rows[row], mask) if mask else array("i")
            signal.setitimer(signal.ITIMER_PROF, 0)
            seconds = time.process_time() - began
            self._shared[place * self._width : place * self._width + len(mask)] = mask
            text = why.encode()
            memory = self._memory.measure()
            self._connection.sendall(
                MASK.pack(row, number, len(mask), int(seconds * 1e6), memory, len(forced), len(text))
                + forced.tobytes()
                + text
            )
            self._give_way(seconds)

    def _mask(self, row: int, tokens: array[int], *, afresh: bool) -> tuple[bytes, str]:
        """Return the mask, and what is wrong."""
        matcher = self._rows.get(row)
        if matcher is None:
            matcher = self._rows[row] = self._matcher.deep_copy()
        elif afresh:
            matcher.reset()
        if not tokens or matcher.consume_tokens(tokens.tolist()):
            mask = matcher.compute_bitmask()
            if not matcher.is_error():
                return mask, ""
        del self._rows[row]  # the row begins again; its error stays
        return b"", _reason(matcher)

    def _give_way(self, seconds: float) -> None:
        self._count += 1
        self._spent += seconds
        if not self._is_nice and self._count >= SLOW_MASKS and self._spent > self._count * SLOW_SECONDS:
            self._is_nice = True
            os.setpriority(os.PRIO_PROCESS, 0, GIVES_WAY)


def _forced(matcher: LLMatcher, mask: bytes) -> array[int]:
    """Return the tokens that must follow the only one that ``mask`` allows; none if it allows several.

    The parser tells which tokens forced text will be. Each is checked against the mask at its place, so that
    taking it is what sampling would have done. Masks of long constants take milliseconds, and a step waits
    for this answer, so after ``FORCING_SECONDS`` no more are looked for.
    """
    forced = array("i")
    until = time.process_time() + FORCING_SECONDS
    token = _only(mask)
    if token is None or len(tokens := matcher.compute_ff_tokens()) < 2 or tokens[0] != token:
        return forced
    ahead = matcher.deep_copy()
    for token in tokens[1 : 1 + MAX_FORCED]:
        if time.process_time() > until:
            break
        if not ahead.consume_token(tokens[len(forced)]) or _only(ahead.compute_bitmask()) != token:
            break
        forced.append(token)
    return forced


def _only(mask: bytes) -> int | None:
    """Return the token that ``mask`` allows, if it allows only one."""
    bits = int.from_bytes(mask, "little")
    return bits.bit_length() - 1 if bits and not bits & (bits - 1) else None


class _Memory:
    """Memory of this process beyond what it shares with the zygote."""

    def __init__(self) -> None:
        self._kib = 0
        self._next = 0.0

    def limit(self, count: int) -> None:
        """Limit it to ``nbytes`` more than now. Systems other than Linux may not enforce it."""
        if sys.platform == "linux":
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[0])
            most = pages * mmap.PAGESIZE + count
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def measure(self) -> int:
        """Return the memory in KiB, as measured recently."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + MEASURE_SECONDS
            self._kib = _own_kib()
        return self._kib


def _own_kib() -> int:
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # with shared memory
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def _silence() -> None:
    """Silence the library's output before an abort. The client caused it, so it does not belong in the
    server's log."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for known in (0, 1, 2):
        os.dup2(nowhere, known)
    os.close(nowhere)


def _reason(matcher: LLMatcher) -> str:
    """Return the reason, without the copy of the grammar that may precede it."""
    text = matcher.get_error().strip()
    if text.startswith("<grammar>"):
        text = text.rpartition("</grammar>")[2].strip() or text
    text = text.removesuffix("<non-verbose/>").strip()
    return text[:MAX_REASON] or "unknown error"
