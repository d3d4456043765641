"""The worker: ``python -m aioengine.grammars.worker CONTROL MASKS DOING``, two sockets and a file.

It ends with the engine, which then finds the texts that it was busy with in the file.

A text is first tried in a child, which the system ends at any bound. What has passed is compiled here in a
thread, where llguidance lets go of the interpreter; the main loop computes masks, for each owner in turn.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from aioengine.grammars.wire import (
    NOTES,
    NUMBER,
    Ask,
    Compile,
    Compiled,
    Drop,
    Forget,
    Hello,
    Inbox,
    Mask,
    Message,
    frame,
)

STACK = 64 * 2**20
"""Stack size in bytes. The compiler is recursive; a thousand levels of a JSON schema take about 8 MiB."""
OVERHEAD = STACK + 64 * 2**20
"""Bytes of address space that any thread takes: its stack and its malloc arena."""
SLOW_SECONDS = 0.005
SLOW_MASKS = 4
"""A text whose masks take longer than this on average, over at least this many, is a slow one."""
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
LONG_NICE = 10
"""Nice values of compiles, so that the model's threads go first."""
LONG_SECONDS = 0.5
"""Seconds after which a trial has the second one."""
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
    os.setpgid(0, 0)
    _end_with_parent()
    control, masks = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:3])
    threading.stack_size(STACK)
    thread = threading.Thread(target=_serve, args=(control, masks, int(sys.argv[3])))
    thread.start()
    thread.join()
    os._exit(0)


def _serve(control: socket.socket, masks: socket.socket, doing: int) -> None:
    inbox = Inbox()
    with suppress(OSError, EOFError):
        while not (found := list(inbox.add(_received(control)))):
            pass
        [hello] = found
        try:
            tokenizer = _load_vocabulary(hello)
        except Exception as error:
            control.sendall(frame(Compiled(0, why=f"{type(error).__name__}: {error}"[:MAX_REASON])))
            return
        control.sendall(frame(Compiled(0)))
        _Worker(control, masks, doing, tokenizer, hello).run(inbox)


class _Text:
    """A text that has compiled."""

    def __init__(self, matcher: LLMatcher, memory: int) -> None:
        self.matcher = matcher
        self.memory = memory
        """Bytes: those of its trial, and by which the process has grown with its masks."""
        self.rows: dict[int, LLMatcher] = {}
        self.count = 0
        self.spent = 0.0
        """Seconds of all masks."""
        self.is_slow = False
        """Whether its masks have taken long on average; this does not change again, so that no ask of a row
        is answered before an earlier one."""


class _Worker:
    def __init__(
        self, control: socket.socket, masks: socket.socket, doing: int, tokenizer: LLTokenizer, hello: Hello
    ) -> None:
        self._control = control
        self._masks = masks
        self._doing = doing
        self._tokenizer = tokenizer
        self._hello = hello
        self._texts: dict[int, _Text | None] = {}
        """By number; None while it compiles."""
        self._trials: dict[int, int] = {}
        """Process ids of the children that try texts, by the texts' numbers."""
        self._quick: deque[tuple[float, int]] = deque()
        """Trials that have not taken long yet, and until when."""
        self._long: set[int] = set()
        """Texts whose trials have taken long, until they are compiled."""
        self._asked: tuple[OrderedDict[str | None, deque[Ask]], ...] = (OrderedDict(), OrderedDict())
        """Masks to compute, by owner; those of slow texts are apart, and give way to the others."""
        self._answers = bytearray()
        """What is still to be sent."""
        self._is_full = False
        """Whether the engine must read some first."""
        self._resident = _resident()
        self._telling = threading.Lock()
        self._watch = selectors.DefaultSelector()
        masks.setblocking(False)
        _limit_memory(hello.total_memory + 8 * OVERHEAD)

    def run(self, inbox: Inbox) -> None:
        """Serve until the engine is gone."""
        self._watch.register(self._control, selectors.EVENT_READ, inbox)
        self._watch.register(self._masks, selectors.EVENT_READ, Inbox())
        try:
            while True:
                idle = LONG_SECONDS if self._quick else None
                for key, ready in self._watch.select(0 if any(self._asked) else idle):
                    if isinstance(key.data, Compile):
                        self._tried(key.data, key.fd)
                    elif ready & selectors.EVENT_READ:
                        assert isinstance(key.fileobj, socket.socket)
                        for message in key.data.add(_received(key.fileobj)):
                            self._take(message)
                until = time.monotonic() + TOGETHER_SECONDS
                while any(self._asked) and time.monotonic() < until:
                    queue = self._asked[0] or self._asked[1]
                    owner, asks = queue.popitem(last=False)
                    self._answer(asks.popleft())
                    if asks:
                        queue[owner] = asks
                self._send()
                self._slow_down()
        finally:
            for pid in self._trials.values():
                os.kill(pid, signal.SIGKILL)

    def _take(self, message: Message) -> None:
        if isinstance(message, Ask):
            text = self._texts.get(message.text)
            is_slow = text is not None and text.is_slow
            self._asked[is_slow].setdefault(message.owner, deque()).append(message)
        elif isinstance(message, Forget):
            if text := self._texts.get(message.text):
                text.rows.pop(message.row, None)
        elif isinstance(message, Compile):
            self._texts[message.number] = None
            self._try(message)
        elif isinstance(message, Drop):
            self._texts.pop(message.number, None)
            if (pid := self._trials.get(message.number)) is not None:
                os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the id is still its own

    def _send(self) -> None:
        """Send as many answers as the engine has room for, and the rest when it has read those."""
        with suppress(BlockingIOError):
            while self._answers:
                del self._answers[: self._masks.send(self._answers)]
        if self._is_full != bool(self._answers):
            self._is_full = bool(self._answers)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._is_full else 0)
            self._watch.modify(self._masks, wanted, self._watch.get_key(self._masks).data)

    # Compiling

    def _try(self, order: Compile) -> None:
        """Compile the text in a child, which any bound may end."""
        reading, writing = os.pipe()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(reading)
            os.close(writing)
            self._tell(Compiled(order.number, why=f"no process could be started: {error}"))
            return
        if pid == 0:
            with suppress(BaseException):
                for other in (self._control, self._masks):
                    other.close()  # the engine sees at once when this process has ended
                _end_with_parent()
                _silence()
                _limit_memory(self._hello.memory + OVERHEAD)
                before = _own_memory()
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_PROF, self._hello.compile_seconds)
                os.nice(NICE)
                why = _reason(LLMatcher(self._tokenizer, order.text, log_level=0, limits=LIMITS))
                os.write(writing, f"{_own_memory() - before} {why}".encode())
            os._exit(0)
        os.close(writing)
        self._trials[order.number] = pid
        self._quick.append((time.monotonic() + LONG_SECONDS, order.number))
        self._watch.register(reading, selectors.EVENT_READ, order)

    def _slow_down(self) -> None:
        """Let trials that take long give way to shorter ones."""
        while self._quick and self._quick[0][0] < time.monotonic():
            _, number = self._quick.popleft()
            if (pid := self._trials.get(number)) is not None:
                os.setpriority(os.PRIO_PROCESS, pid, LONG_NICE)
                self._long.add(number)

    def _tried(self, order: Compile, reading: int) -> None:
        said = os.read(reading, 4 * MAX_REASON).decode(errors="replace")
        self._watch.unregister(reading)
        os.close(reading)
        _, status = os.waitpid(self._trials.pop(order.number), 0)
        memory, _, why = said.partition(" ")
        if said and not why and order.number in self._texts:
            threading.Thread(target=self._compile, args=(order, int(memory)), daemon=True).start()
        else:
            self._texts.pop(order.number, None)
            self._long.discard(order.number)
            code = os.waitstatus_to_exitcode(status)
            self._tell(Compiled(order.number, code if code or said else -signal.SIGABRT, why))

    def _compile(self, order: Compile, memory: int) -> None:
        """Compile a text that has passed its trial; in a thread."""
        # A short one is no nicer: for moments it holds the interpreter, for which masks would wait.
        if sys.platform == "linux" and order.number in self._long:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LONG_NICE)
        place = 1 + order.number % (NOTES - 1)
        self._note(place, order.number)
        matcher = LLMatcher(self._tokenizer, order.text, log_level=0, limits=LIMITS)
        self._note(place, 0)
        self._long.discard(order.number)
        if order.number in self._texts:
            self._texts[order.number] = _Text(matcher, memory)
        self._tell(Compiled(order.number, why=_reason(matcher), memory=memory))

    def _tell(self, message: Compiled) -> None:
        with self._telling:
            self._control.sendall(frame(message))

    def _note(self, place: int, number: int) -> None:
        """Note which text may end this process now. The first place is for masks."""
        os.pwrite(self._doing, NUMBER.pack(number), place * NUMBER.size)

    # Masks

    def _answer(self, ask: Ask) -> None:
        text = self._texts.get(ask.text)
        if text is None:
            self._answers += frame(Mask(ask.number, b"", [], 0.0, 0, "the grammar was dropped"))
            return
        self._note(0, ask.text)
        began = time.thread_time()
        mask, why = self._mask(text, ask)
        waiting = sum(map(len, self._asked[0].values()))
        forced = _forced(text.rows[ask.row], mask, FORCING_SECONDS / (1 + waiting)) if mask else []
        seconds = time.thread_time() - began
        self._note(0, 0)
        text.count += 1
        text.spent += seconds
        text.is_slow = text.is_slow or text.spent > max(text.count, SLOW_MASKS) * SLOW_SECONDS
        if seconds > GROWS_SECONDS:
            before, self._resident = self._resident, _resident()
            text.memory += max(0, self._resident - before)
        if seconds > self._hello.mask_seconds:
            mask = b""
            why = f"the grammar takes more than {self._hello.mask_seconds:g} s of processor time for a token"
        self._answers += frame(Mask(ask.number, mask, forced, seconds, text.memory, why))

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
        if not isinstance(text, str):
            raise TypeError("takes text")  # so that it is not called with bytes
        tokens = self._own.tokenize_str(text)
        return tokens if self._added.isdisjoint(tokens) else self._own.greedy_tokenize(text)


# The process


def _received(connection: socket.socket) -> bytes:
    """Receive some bytes. Raises EOFError if the engine is gone."""
    data = connection.recv(2**18)
    if not data:
        raise EOFError
    return data


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
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * mmap.PAGESIZE + count
        _, highest = resource.getrlimit(resource.RLIMIT_AS)
        most = most if highest == resource.RLIM_INFINITY else min(most, highest)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _resident() -> int:
    """Return the bytes of memory that the process takes; 0 where that is not known cheaply."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _own_memory() -> int:
    """Return the bytes that a child does not share with its parent."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # with shared memory
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith("Private_"))


def _silence() -> None:
    """Silence the library's output before an abort. The client caused it, so it does not belong in the
    server's log."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for known in (0, 1, 2):
        os.dup2(nowhere, known)
    os.close(nowhere)


if __name__ == "__main__":
    main()
