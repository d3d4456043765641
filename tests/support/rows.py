"""A device whose rows have any number of tokens, and what a request must get whatever that number is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from support.full_sim import FullSim

from aioengine import events
from aioengine.core.state import Request
from aioengine.events import EndReason
from aioengine.request import SamplingParams, TokenLogprob
from aioengine.step import Sampled, SequenceWork

EOS = 1


def model(history: list[int]) -> int:
    """Texts that repeat themselves, so that some drafts are right, and end now and then."""
    return EOS if sum(history) % 41 == 7 else 2 + history[-1] % 5 + len(history) % 4 // 3


class Reader:
    """A request's sink. ``stop``: two tokens that stand for a stop string, which may lie over a row's
    edge."""

    def __init__(self, request: Request, stop: tuple[int, int] | None, *, late: bool) -> None:
        self.request = request
        self.stop = stop
        self.waits_for_end = late and stop is None and request.params.logprobs is None
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.times: list[float] = []
        self.reason: EndReason | None = None

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], *, is_stop: bool) -> int | None:
        assert tokens and self.reason is None
        if self.waits_for_end:  # those before were not pushed
            self.tokens = self.request.tokens[self.request.prompt_len : -len(tokens)]
        assert self.request.tokens[self.request.prompt_len :] == [*self.tokens, *tokens]
        left = None
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            assert (token == EOS) == (is_stop and count == len(tokens)), "nothing comes after the end"
            if self.stop is not None and tuple(self.tokens[-2:]) == self.stop:
                left = count
                break
        self.logprobs += logprobs[:left]
        return left

    def end(self, reason: EndReason, error: Exception | None) -> None:
        assert self.reason is None, "it ends once"
        self.reason = reason
        if self.waits_for_end:
            self.tokens = self.request.tokens[self.request.prompt_len :]


class RowSim(FullSim):
    """A core with readers, whose device gives rows of no, one or several tokens: late constraints, drafts
    that are right or not, forced tokens, and several steps at once."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.readers: dict[str, Reader] = {}
        self._late: set[tuple[str, int]] = set()

    def read(self, request: Request, stop: tuple[int, int] | None = None, *, late: bool = True) -> Reader:
        reader = self.readers[request.id] = Reader(request, stop, late=late)
        request.sink = reader
        return reader

    def sample(self, work: SequenceWork) -> list[Sampled]:
        place = work.request_id, len(work.history)
        if work.params.constraint is not None and sum(work.history) % 3 == 0 and place not in self._late:
            self._late.add(place)
            return [Sampled(-1, late=True)]
        found = super().sample(work)
        if work.params.logprobs is None:
            return found
        return [
            one._replace(logprob=self.logprob(one.token, len(work.history) + i), forced=())
            for i, one in enumerate(found)
        ]

    @staticmethod
    def logprob(token: int, position: int) -> TokenLogprob:
        return TokenLogprob(token, -position / 16)

    def choose(self, work: SequenceWork, history: list[int]) -> int:
        return self.token_after(history, work.prompt_len, work.params)

    def token_after(self, history: list[int], prompt_len: int, params: SamplingParams) -> int:
        """Return the next token. A penalty is on what was chosen before, and not on the prompt."""
        token = self.next_token(history)
        if params.presence_penalty and token != EOS and token in history[prompt_len:]:
            return 2 + (token + len(history)) % 6
        return token

    def forced_after(self, history: list[int]) -> int:
        return sum(history) * 7 % 8

    def expected(self, reader: Reader) -> tuple[list[int], EndReason]:
        """The output of a request if each step gives it one token, and why it ends."""
        request = reader.request
        history = request.tokens[: request.prompt_len]
        while True:
            history.append(self.token_after(history, request.prompt_len, request.params))
            output = history[request.prompt_len :]
            if history[-1] == EOS or (reader.stop is not None and tuple(output[-2:]) == reader.stop):
                return output, "stop"
            if len(output) == request.params.max_tokens:
                return output, "length"

    def check_reader(self, reader: Reader) -> None:
        """What was read is the beginning of what one token a step gives, or all of it."""
        tokens, reason = self.expected(reader)
        request = reader.request
        assert reader.tokens == tokens[: len(reader.tokens)]
        if reader.reason in ("stop", "length"):
            assert (reader.tokens, reader.reason) == (tokens, reason)
        if request.params.logprobs is not None:
            first = request.prompt_len
            assert reader.logprobs == [self.logprob(t, first + i) for i, t in enumerate(reader.tokens)]

    def check_events(self) -> None:
        """Events are in the order of their times, and say what readers have got."""
        firsts = {e.request_id: e.time for e in self.events if isinstance(e, events.FirstToken)}
        for event in self.events:
            reader = self.readers.get(getattr(event, "request_id", ""))
            if reader is None or not isinstance(event, events.RequestEnded):
                continue
            assert event.output_tokens == len(reader.tokens) and event.reason == reader.reason
            assert (event.request_id in firsts) == bool(reader.tokens)
            assert firsts.get(event.request_id, 0.0) <= event.time
        ends = [event.time for event in self.events if isinstance(event, events.RequestEnded)]
        assert ends == sorted(ends)
