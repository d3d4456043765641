"""The zygote: ``python -m aioengine.grammars.zygote CONTROL MEMORY``.

It has the tokenizer, no threads, and little else, and forks a child for each grammar. It ends with the
engine, and its children end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import selectors
import signal
import socket
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import NoReturn

from llguidance import LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from aioengine.grammars import child
from aioengine.grammars.wire import EXITED, HELLO, KILL, LENGTH, ORDER, START, text_frame


def main() -> NoReturn:
    # Only the engine ends this process, so it is in a separate process group. It is not in a separate
    # session, because Linux would give that as much of the processors as the engine, whatever the nice
    # values (sched(7), autogroup).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setpgid(0, 0)
    die_with_parent = _parental_death()
    die_with_parent()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    with contextlib.suppress(OSError, EOFError):
        _serve(control, int(sys.argv[2]), die_with_parent)
    os._exit(0)


def _serve(control: socket.socket, memory: int, die_with_parent: Callable[[], None]) -> None:
    vocab, width, size, count = HELLO.unpack(_exactly(control, HELLO.size))
    eos = array("i", _exactly(control, 4 * count))
    (length,) = LENGTH.unpack(_exactly(control, LENGTH.size))
    text = _exactly(control, length).decode()
    shared = mmap.mmap(memory, size)
    os.close(memory)
    try:
        tokenizer = _load_vocabulary(text, vocab, eos)
    except Exception as error:
        control.sendall(text_frame(f"{type(error).__name__}: {error}"[:2000]))
        return
    del text
    control.sendall(text_frame(""))
    gc.collect()
    gc.freeze()  # otherwise each child would copy the pages that its garbage collector touches
    engine = os.getpid()

    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    running: dict[int, int] = {}
    watch = selectors.DefaultSelector()
    watch.register(control, selectors.EVENT_READ)
    watch.register(woken, selectors.EVENT_READ)

    def end(number: int) -> None:
        pid = next((pid for pid, known in running.items() if known == number), None)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)  # nobody has waited for it, so the id is still its own

    def fork(connection: socket.socket, number: int, limits: child.Limits) -> None:
        pid = os.fork()
        if pid != 0:
            running[pid] = number
            return
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            die_with_parent()
            if os.getppid() == engine:  # otherwise the engine ended before die_with_parent
                watch.close()
                for other in (control, woken, wake):
                    other.close()
                child.run(connection, tokenizer, shared, width, limits)
        finally:
            os._exit(1)

    try:
        while True:
            for key, _ in watch.select():
                if key.fileobj is woken:
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                    _reap(running, control)
                    continue
                data, fds, _, _ = socket.recv_fds(control, ORDER.size, 1)
                data += _exactly(control, ORDER.size - len(data)) if data else b""
                if not data:
                    raise EOFError
                what, number, *limits = ORDER.unpack(data)
                if what == KILL:
                    end(number)
                    continue
                assert what == START
                with socket.socket(fileno=fds[0]) as connection:
                    fork(connection, number, child.Limits(*limits))
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)


def _reap(running: dict[int, int], control: socket.socket) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        control.sendall(EXITED.pack(running.pop(pid), os.waitstatus_to_exitcode(status)))


def _parental_death() -> Callable[[], None]:
    """Return a function that lets the kernel end this process with its parent, where the system supports it.
    Elsewhere they notice the closed connection: the zygote at once, a child after its compile."""
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl
    pr_set_pdeathsig = 1
    return lambda: prctl(pr_set_pdeathsig, int(signal.SIGKILL))


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 2**20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _load_vocabulary(text: str, vocab: int, eos: Sequence[int]) -> LLTokenizer:
    """Build the vocabulary as llguidance sees it, from the content of a ``tokenizer.json``: text is never
    written with added tokens. Raises ValueError for a kind of tokenizer that llguidance does not know."""
    own = LLTokenizer(text, n_vocab=vocab, eos_token=list(eos) or None)
    return LLTokenizer(TokenizerWrapper(_Literal(own)), n_vocab=vocab, eos_token=own.eos_tokens)


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


if __name__ == "__main__":
    main()
