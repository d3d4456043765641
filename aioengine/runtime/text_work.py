"""Runs tokenization and detokenization: short texts on the loop, long ones in separate threads."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Collection, Iterable, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from heapq import heappop, heappush
from itertools import chain, count
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from aioengine.errors import EngineStopped, PromptTooLong, RequestInvalid
from aioengine.request import Prompt

if TYPE_CHECKING:
    from aioengine.model.text.tokenizer import Tokenizer

T = TypeVar("T")
Owner = str | None

SHORT = 1024
"""Size (characters, tokens or bytes) up to which work is done on the loop, in about a millisecond."""

MOST = 2**17
"""Values of JSON that are measured; it may contain itself."""

LONG = 2**16
"""Size above which texts leave one thread free for shorter ones."""

EACH = 16
"""Size of an empty text: what each call of the tokenizer takes besides."""


def size_of_all(texts: Collection[Sized]) -> int:
    """Return the size of the work on several texts."""
    return sum(map(len, texts)) + EACH * len(texts)


def size_of_json(value: object) -> int:
    """Return the size of JSON that a chat template may write: its texts, names included, and all values (at
    most ``MOST`` of them)."""
    size, left = 0, [value]
    for _ in range(MOST):
        if not left:
            break
        item = left.pop()
        size += 1
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            left += item
            left += item.values()
        elif isinstance(item, (list, tuple)):
            left += item
    return size


class _Text(NamedTuple):
    """A text that waits for a thread."""

    start: float
    """Virtual time at which it starts."""
    number: int
    is_long: bool
    work: Callable[[], Any]
    begun: asyncio.Future[asyncio.Future[Any]]


class TextWork:
    """Runs functions whose time grows with a text's length: short ones at once, on the loop, longer ones in
    ``threads`` threads that nothing else uses. Texts over ``LONG`` have all threads but one.

    Owners have equal shares by start-time fair queueing (Goyal, Vin and Cheng, 1996): an owner's next text
    starts, in virtual time, where its last one ended, or now if that is later; the one that starts first is
    next. Virtual time is the start of the text that was begun last. So a text waits at most for those that
    run and for one of each other owner. An owner's long texts and its others are counted separately.
    """

    def __init__(self, threads: int = 2) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="aioengine-text")
        self._count = threads
        self._running: dict[asyncio.Future[Any], bool] = {}
        """Whether each is long."""
        self._waiting: tuple[list[_Text], list[_Text]] = [], []
        """Heaps of short and of long texts."""
        self._ends: dict[tuple[Owner, bool], float] = {}
        """Virtual time at which the last text of each owner ends."""
        self._now = 0.0
        self._numbers = count()
        self._closed = False

    async def run(self, size: int, work: Callable[[], T], owner: Owner = None) -> T:
        """Run ``work()`` and return its result; ``size`` is the length of its text.

        If the call is cancelled while ``work`` runs in a thread, it goes on there and its result is dropped.
        Raises EngineStopped after :meth:`close`.
        """
        if size <= SHORT:
            return work()
        if self._closed:
            raise EngineStopped("the engine has been stopped")
        begun: asyncio.Future[asyncio.Future[T]] = asyncio.get_running_loop().create_future()
        is_long = size > LONG and self._count > 1
        start = max(self._now, self._ends.get((owner, is_long), 0.0))
        self._ends[owner, is_long] = start + size
        heappush(self._waiting[is_long], _Text(start, next(self._numbers), is_long, work, begun))
        self._begin()
        return await asyncio.shield(await begun)

    async def close(self) -> None:
        """Wait for running work; waiting work fails with EngineStopped."""
        self._closed = True
        for text in chain(*self._waiting):
            if not text.begun.done():
                text.begun.set_exception(EngineStopped("the engine was stopped before the text's turn"))
        await asyncio.gather(*self._running, return_exceptions=True)
        self._threads.shutdown(wait=True)

    def _begin(self) -> None:
        """Begin the next texts, as long as a thread is free."""
        while len(self._running) < self._count:
            has_room = sum(self._running.values()) < self._count - 1
            heaps = [heap for heap in self._waiting[: 1 + has_room] if heap]
            if not heaps:
                break
            text = heappop(min(heaps))
            if text.begun.done():  # cancelled, or closed
                continue
            self._now = max(self._now, text.start)
            job = asyncio.get_running_loop().run_in_executor(self._threads, text.work)
            self._running[job] = text.is_long
            job.add_done_callback(self._ended)
            text.begun.set_result(job)
        self._ends = {owner: end for owner, end in self._ends.items() if self._running and end > self._now}

    def _ended(self, job: asyncio.Future[Any]) -> None:
        job.exception()  # its caller may have been cancelled
        del self._running[job]
        self._begin()


def token_ids(prompt: object, *, vocab: int, limit: int) -> list[int] | None:
    """Return a copy of a prompt that is token ids; None for another one. Raises RequestInvalid for an id that
    is not below ``vocab``; PromptTooLong beyond ``limit`` ids."""
    if not isinstance(prompt, list):
        return None
    if len(prompt) > limit and type(prompt[0]) is int:
        raise PromptTooLong(len(prompt), limit)  # before they are looked at one by one
    try:
        return msgspec.convert(prompt, _ids_below(vocab))  # one pass, in a fifth of the time of several
    except msgspec.ValidationError:
        if set(map(type, prompt)) <= {int}:
            check_vocabulary("prompt", prompt, vocab)
        return None


@functools.cache
def _ids_below(vocab: int) -> type[list[int]]:
    return list[Annotated[int, Meta(ge=0, lt=vocab)]]


def check_vocabulary(what: str, tokens: Iterable[int], vocab: int) -> None:
    """Raise RequestInvalid for the first token that the model does not know."""
    for token in tokens:
        if not 0 <= token < vocab:
            raise RequestInvalid(f"{what} token {token} is outside the vocabulary 0..{vocab - 1}")


async def tokenize(
    prompt: Prompt, owner: str | None, *, vocab: int, limit: int, tokenizer: Tokenizer | None, work: TextWork
) -> list[int]:
    """Return the token ids of a prompt, which may be that already, or a text, or a chat, which the model's
    template renders. These are tokenized in ``owner``'s share of ``work``. Raises RequestInvalid for tokens
    that are not below ``vocab``; PromptTooLong beyond ``limit`` tokens."""
    ids = token_ids(prompt, vocab=vocab, limit=limit)
    if ids is not None:
        return ids
    if not isinstance(prompt, (str, list)):
        raise RequestInvalid(
            f"prompt must be str, list of token ids or list of messages, not {type(prompt).__name__}"
        )
    if tokenizer is None:
        raise RequestInvalid("the model has no tokenizer.json: give the prompt as a list of token ids")
    encode: Callable[[], list[int]]
    if isinstance(prompt, str):
        size, encode = len(prompt), partial(tokenizer.encode, prompt, limit=limit)
    else:
        messages: Any = prompt
        size = SHORT + size_of_json(messages)  # never on the loop: a template may take any time
        encode = lambda: tokenizer.encode(tokenizer.render_chat(messages), False, limit=limit)  # noqa: E731
    ids = await work.run(size, encode, owner)
    check_vocabulary("prompt", (min(ids, default=0), max(ids, default=0)), vocab)
    return ids
