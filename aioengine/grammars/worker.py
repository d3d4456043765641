"""The worker: ``python -m aioengine.grammars.worker CONNECTION``, a socket. It ends with the engine. In the
file that is its standard output it notes the text for which it works.

A text is first tried in a child, which the system ends at any bound. What has passed is compiled here in a
thread, where llguidance lets go of the interpreter; the main loop computes masks, for each owner in turn.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import NoReturn

import psutil
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from aioengine.grammars import wire
from aioengine.grammars.limits import GrammarLimits, MiB
from aioengine.grammars.wire import Ask, Compile, Compiled, Drop, Hello, Mask, Outcome

STACK = 64 * MiB
"""Stack size in bytes. The compiler is recursive; a thousand levels of a JSON schema take about 8 MiB."""
OVERHEAD = STACK + 64 * MiB
"""Bytes of address space that any thread takes: its stack and its malloc arena."""
MAX_FORCED = 31
"""Maximum forced tokens in an answer. A step computes all of them, while other requests' tokens wait."""
FORCING_SECONDS = 0.003
"""Processor time in which forced tokens are looked for, by all masks that are asked for at a time."""
TOGETHER_SECONDS = 0.0005
"""Answers that are computed within this time are sent together."""
GROWS_SECONDS = 0.0005
"""Whether a text has taken memory is looked at after masks that take longer than this."""
MAX_REASON = 2000
"""Maximum characters of a reason."""
NICE = 5
"""Nice value of a trial, and of the compile after a long one, so that the model's threads go first."""
LONG_SECONDS = 0.5
"""A shorter compile is not nice: for moments it holds the interpreter, for which masks would wait."""
# Measured with ambiguous grammars; the properties of an object need items of a row.
LIMITS = LLParserLimits(
    step_max_items=5_000, step_lexer_fuel=50_000, max_lexer_states=100_000, verbose_errors=False
)


def main() -> None:
    # Only the engine ends this process, so it is in a separate process group. It is not in a separate
    # session, because Linux would give that as much of the processors as the engine, whatever the nice
    # values (sched(7), autogroup).
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGALRM):  # of the bounds on a trial
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)
    _end_with_parent()
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve, args=(Connection(int(sys.argv[1])),))
    thread.start()
    thread.join()
    os._exit(0)


def _serve(connection: Connection) -> None:
    with suppress(OSError, EOFError):
        [hello] = wire.orders.decode(connection.recv_bytes())
        assert isinstance(hello, Hello)
        tokenizer = _load_vocabulary(hello)  # if it raises, the engine finds the last line of the traceback
        worker = _Worker(connection, _take_output(), tokenizer, hello.limits)
        connection.send_bytes(wire.encode([Compiled(hello.number, "compiled")]))
        worker.run()


class _Text:
    """A text that has compiled."""

    def __init__(self, matcher: LLMatcher, memory: int) -> None:
        self.matcher = matcher
        self.memory = memory
        """Bytes: those of its trial, and by which the process has grown with its masks."""
        self.rows: dict[int, LLMatcher] = {}


class _Worker:
    def __init__(
        self, connection: Connection, notes: int, tokenizer: LLTokenizer, limits: GrammarLimits
    ) -> None:
        self._connection = connection
        self._notes = notes
        self._tokenizer = tokenizer
        self._limits = limits
        self._texts: dict[int, _Text | None] = {}
        """By number; None while it compiles."""
        self._trials: dict[int, ForkProcess] = {}
        """The children that try texts, by the texts' numbers."""
        self._asked: tuple[OrderedDict[str | None, deque[Ask]], ...] = (OrderedDict(), OrderedDict())
        """Masks to compute, by owner; those of slow rows are apart, and give way to the others. Whether a row
        is slow does not change while it waits, so its answers keep their order."""
        self._memory = _memory()
        self._sending, self._computing = threading.Lock(), threading.Lock()
        _limit_memory(limits.total_memory + 8 * OVERHEAD)

    def run(self) -> NoReturn:
        """Serve until the engine is gone, which raises EOFError or OSError."""
        while True:
            if not any(self._asked) or self._connection.poll():
                self._receive()
            answers = []
            until = time.monotonic() + TOGETHER_SECONDS
            while any(self._asked) and time.monotonic() < until:
                queue = self._asked[0] or self._asked[1]
                owner, asks = queue.popitem(last=False)
                with self._computing:
                    answers.append(self._answer(asks.popleft()))
                if asks:
                    queue[owner] = asks
            if answers:
                self._tell(*answers)

    def _receive(self) -> None:
        for order in wire.orders.decode(self._connection.recv_bytes()):
            if isinstance(order, Ask):
                self._asked[order.slow].setdefault(order.owner, deque()).append(order)
            elif isinstance(order, Compile):
                self._texts[order.number] = None
                threading.Thread(target=self._compile, args=(order,), daemon=True).start()
            elif isinstance(order, Drop) and order.row is not None:
                if (text := self._texts.get(order.number)) is not None:
                    text.rows.pop(order.row, None)
            elif isinstance(order, Drop):
                self._texts.pop(order.number, None)
                with self._computing:
                    if (trial := self._trials.get(order.number)) is not None:
                        trial.kill()

    def _tell(self, *answers: wire.Answer) -> None:
        with self._sending:
            self._connection.send_bytes(wire.encode(answers))

    # Compiling

    def _compile(self, order: Compile) -> None:
        """Compile a text that passes its trial, and answer whatever happens; in a thread."""
        began = time.monotonic()
        try:
            said = self._tried(order)
            if said.outcome == "compiled" and order.number in self._texts:
                if sys.platform == "linux" and time.monotonic() - began > LONG_SECONDS:
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
                matcher = LLMatcher(self._tokenizer, order.text, log_level=0, limits=LIMITS)
                if order.number in self._texts:
                    self._texts[order.number] = _Text(matcher, said.memory)
        except Exception as error:
            said = Compiled(order.number, "failed", f"{type(error).__name__}: {error}"[:MAX_REASON])
        if said.outcome != "compiled":
            self._texts.pop(order.number, None)
        self._tell(said)

    def _tried(self, order: Compile) -> Compiled:
        """Compile the text in a child, which any bound may end."""
        said: list[wire.Answer] = []
        reading, writing = multiprocessing.Pipe(duplex=False)
        trial = ForkProcess(target=self._try, args=(order, writing))
        with writing, self._computing:  # no mask is, whose locks would stay locked in the child
            trial.start()
            self._trials[order.number] = trial
        with reading, suppress(EOFError):
            said = wire.answers.decode(reading.recv_bytes())
        with self._computing:
            self._trials.pop(order.number).join()
        if said and isinstance(said[0], Compiled):
            return said[0]
        return Compiled(order.number, *self._ended_by(trial.exitcode))

    def _try(self, order: Compile, answer: Connection) -> NoReturn:
        """Compile the text within its bounds, in a child."""
        _end_with_parent()
        self._connection.close()  # the engine sees at once when its parent has ended
        _limit_memory(self._limits.memory + OVERHEAD)
        before = _memory()
        signal.setitimer(signal.ITIMER_PROF, self._limits.compile_seconds)
        signal.setitimer(signal.ITIMER_REAL, self._limits.compile_wall_seconds)
        os.nice(NICE)
        why = _reason(LLMatcher(self._tokenizer, order.text, log_level=0, limits=LIMITS))
        said = Compiled(order.number, "compiled", memory=max(0, _memory() - before))
        if why:
            said = Compiled(order.number, "invalid", f"cannot be used: {why}")
        answer.send_bytes(wire.encode([said]))
        os._exit(0)  # masks wait for its end, and not for a clean-up

    def _ended_by(self, status: int | None) -> tuple[Outcome, str]:
        """Explain the end of a child that has said nothing."""
        limits = self._limits
        if status in (-signal.SIGPROF, -signal.SIGXCPU):
            return "limit", f"takes more than {limits.compile_seconds:g} s of processor time to compile"
        if status == -signal.SIGALRM:
            return "limit", f"takes more than {limits.compile_wall_seconds:g} s to compile (machine busy?)"
        if status in (1, -signal.SIGABRT):
            return "limit", f"takes more than {limits.memory // MiB} MiB to compile"
        if status in (-signal.SIGSEGV, -signal.SIGBUS):
            return "limit", "is nested too deeply to be compiled: its compiler's stack is full"
        return "failed", f"the process that compiled the grammar was lost (status {status})"

    # Masks

    def _answer(self, ask: Ask) -> Mask:
        text = self._texts.get(ask.text)
        if text is None:
            return Mask(ask.number, b"", [], 0.0, 0, "the grammar was dropped")
        os.pwrite(self._notes, wire.TEXT.pack(ask.text), 0)
        began = time.thread_time()
        mask, why = self._mask(text, ask)
        waiting = sum(map(len, self._asked[0].values()))
        forced = _forced(text.rows[ask.row], mask, FORCING_SECONDS / (1 + waiting)) if mask else []
        seconds = time.thread_time() - began
        os.pwrite(self._notes, wire.TEXT.pack(0), 0)
        if seconds > GROWS_SECONDS:
            before, self._memory = self._memory, _memory()
            text.memory += max(0, self._memory - before)
        if seconds > self._limits.mask_seconds:
            mask = b""
            why = f"the grammar takes more than {self._limits.mask_seconds:g} s of processor time for a token"
        return Mask(ask.number, mask, forced, seconds, text.memory, why)

    def _mask(self, text: _Text, ask: Ask) -> tuple[bytes, str]:
        """Return the mask, and what is wrong."""
        matcher = text.rows.get(ask.row)
        if matcher is None:
            matcher = text.rows[ask.row] = text.matcher.deep_copy()
        elif ask.afresh:
            matcher.reset()
        if not ask.tokens or matcher.consume_tokens(ask.tokens):
            mask = matcher.compute_bitmask()
            if not matcher.is_error():
                return mask, ""
        del text.rows[ask.row]  # the row begins again; its error stays
        return b"", _reason(matcher)


def _forced(matcher: LLMatcher, mask: bytes, seconds: float) -> list[int]:
    """Return the tokens that must follow the only one that ``mask`` allows; none if it allows several.

    The parser tells which tokens forced text will be. Each is checked against the mask at its place, so that
    taking it is what sampling would have done. Masks of long constants take milliseconds, and a step waits
    for this answer, so after ``seconds`` of processor time no more are looked for.
    """
    forced: list[int] = []
    until = time.thread_time() + seconds
    token = _only(mask)
    if token is None or len(tokens := matcher.compute_ff_tokens()) < 2 or tokens[0] != token:
        return forced
    ahead = matcher.deep_copy()
    for token in tokens[1 : 1 + MAX_FORCED]:
        if time.thread_time() > until:
            break
        if not ahead.consume_token(tokens[len(forced)]) or _only(ahead.compute_bitmask()) != token:
            break
        forced.append(token)
    return forced


def _only(mask: bytes) -> int | None:
    """Return the token that ``mask`` allows, if it allows only one."""
    bits = int.from_bytes(mask, "little")
    return bits.bit_length() - 1 if bits and not bits & (bits - 1) else None


def _reason(matcher: LLMatcher) -> str:
    """Return what is wrong, without the copy of the grammar that may precede it; empty if nothing is."""
    if not matcher.is_error():
        return ""
    text = matcher.get_error().strip()
    if text.startswith("<grammar>"):
        text = text.rpartition("</grammar>")[2].strip() or text
    text = text.removesuffix("<non-verbose/>").strip()
    return text[:MAX_REASON] or "unknown error"


# Vocabulary


def _load_vocabulary(hello: Hello) -> LLTokenizer:
    """Build the vocabulary as llguidance sees it, from the content of a ``tokenizer.json``: text is never
    written with added tokens. Raises ValueError for a kind of tokenizer that llguidance does not know."""
    own = LLTokenizer(hello.tokenizer, n_vocab=hello.vocab, eos_token=hello.eos or None)
    return LLTokenizer(TokenizerWrapper(_Literal(own)), n_vocab=hello.vocab, eos_token=own.eos_tokens)


class _Literal:
    """Tokenizes text that a grammar forces as the model's tokenizer does, but without added tokens.

    A tokenizer makes one token of a text such as "<think>" if that was added to its vocabulary. To a grammar
    such a token is not text: ``"<think>"`` means these seven characters, and ``<[id]>`` the token. If forced
    text were tokenized that way, the grammar would refuse the token that it has forced itself.
    """

    def __init__(self, own: LLTokenizer) -> None:
        self._own = own
        tokens = range(own.vocab_size)
        self._added = frozenset(token for token in tokens if own.is_special_token(token))
        # What llguidance asks for.
        self.eos_token_id = own.eos_token
        self.bos_token_id = None
        self.special_token_ids = sorted(self._added)
        self.tokens = [own.decode_bytes([token]) for token in tokens]

    def __call__(self, text: str) -> list[int]:
        tokens = self._own.tokenize_str(text)
        return tokens if self._added.isdisjoint(tokens) else self._own.greedy_tokenize(text)


# The process


def _end_with_parent() -> None:
    """Let the kernel end this process with its parent, where the system supports it. Elsewhere the worker
    notices the closed connection, and a child ends at its bounds."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


def _limit_memory(count: int) -> None:
    """Bound the address space to ``count`` bytes more than now. Systems other than Linux may not enforce
    it."""
    if sys.platform == "linux":
        most = psutil.Process().memory_info().vms + count
        _, highest = resource.getrlimit(resource.RLIMIT_AS)
        most = most if highest == resource.RLIM_INFINITY else min(most, highest)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _memory() -> int:
    """Return the bytes that the process takes, without those of files where the system tells them apart."""
    info = psutil.Process().memory_info()
    return int(info.rss) - int(getattr(info, "shared", 0))


def _take_output() -> int:
    """Return the file of the standard output, emptied. From now on the library's output is lost: clients
    cause it, so it does not belong in the server's log."""
    notes, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for known in (0, 1, 2):
        os.dup2(nowhere, known)
    os.ftruncate(notes, 0)
    return notes


if __name__ == "__main__":
    main()
