"""Grammars in a process of their own: bounds, turns, ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psutil
import pytest
from llguidance import LLMatcher, LLTokenizer
from support import hostile_grammars as hostile
from support.byte_tokenizer import byte_tokenizer
from support.cancel_at import Moment, cancel_everywhere
from support.waiting import SECONDS, until

from aioengine.errors import AioEngineError, EngineOverloaded, EngineStopped, RequestInvalid
from aioengine.grammars.limits import GrammarLimits, MiB
from aioengine.grammars.service import MAX_ENDS, Grammars
from aioengine.grammars.wire import TEXT
from aioengine.step import OutputView

EOS = 255


def bounds(**fields: Any) -> GrammarLimits:
    """With more wall time than any machine needs."""
    return GrammarLimits(**{"compile_wall_seconds": 600.0, "mask_wall_seconds": 600.0, **fields})


FAST = bounds(compile_seconds=0.5)
from_json = LLMatcher.grammar_from_json_schema
from_lark = LLMatcher.grammar_from_lark
from_regex = LLMatcher.grammar_from_regex


JSON = byte_tokenizer().to_str()
TOKENIZER = LLTokenizer(JSON, n_vocab=256, eos_token=[EOS])


@contextlib.asynccontextmanager
async def grammars(limits: GrammarLimits = FAST) -> AsyncIterator[Grammars]:
    before = descendants()
    service = Grammars(lambda: JSON, 256, [EOS], limits=limits)
    try:
        yield service
    finally:
        await service.close()
        assert descendants() <= before, "processes are left"


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def worker() -> psutil.Process:
    [found] = workers()
    return found


def workers() -> list[psutil.Process]:
    return running(psutil.Process(), "aioengine.grammars.worker")


def trials() -> list[psutil.Process]:
    """The processes in which texts are tried."""
    return [child for parent in workers() for child in running(parent)]


def running(parent: psutil.Process, word: str = "") -> list[psutil.Process]:
    """Its children with ``word`` in their command lines. Any of them may end at any moment."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in parent.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found


def tokens(text: str) -> list[int]:
    return TOKENIZER.tokenize_str(text)


# What it gives


GRAMMARS = [
    from_json(
        json.dumps({"type": "object", "properties": {"a": {"enum": [1, 22]}, "b": {"type": "string"}}})
    ),
    from_regex("(ab|cd*){1,9}z?"),
    from_lark('start: "(" start ")" | /[0-9]+/'),
]


@pytest.mark.parametrize("text", GRAMMARS)
@pytest.mark.slow
async def test_masks_are_those_of_the_parser(text: str) -> None:
    """... along random outputs of several requests that take turns, with jumps to others."""
    async with grammars() as service:
        rng = random.Random(1)
        rows = [(await service.constraint(text, None), [*()]) for _ in range(3)]
        output: list[int]
        for _ in range(60):
            constraint, output = rng.choice(rows)
            if rng.random() < 0.1:
                del output[rng.randrange(len(output) + 1) :]
            alone = LLMatcher(TOKENIZER, text, log_level=0)
            assert alone.consume_tokens(output)
            mask = alone.compute_bitmask()
            assert constraint.allowed(output) == mask
            allowed = [t for t in range(256) if mask[t // 8] >> t % 8 & 1 and t != EOS]
            if allowed:
                output.append(rng.choice(allowed))


@pytest.mark.parametrize("text", [*GRAMMARS, from_regex("abcdefgh[xy]zzzz(pq|rstuvw){3}" + "l" * 50)])
@pytest.mark.slow
async def test_forced_tokens_are_the_only_ones_at_their_places(text: str) -> None:
    async with grammars() as service:
        forced = 0
        for seed in range(12):
            rng = random.Random(seed)
            constraint = await service.constraint(text, None)
            output: list[int] = []
            while len(output) < 60:
                mask = constraint.allowed(output)
                allowed = [t for t in range(256) if is_set(mask, t) and t != EOS]
                if not allowed:
                    break
                output.append(rng.choice(allowed))
                after = list(constraint.forced)
                assert not after or len(allowed) == 1
                for token in after:
                    alone = LLMatcher(TOKENIZER, text, log_level=0)
                    assert alone.consume_tokens(output)
                    mask = alone.compute_bitmask()
                    assert [t for t in range(256) if is_set(mask, t)] == [token]
                    output.append(token)
                forced += len(after)
        assert forced > 50 or text in GRAMMARS


async def test_one_compile_for_all_who_want_the_same() -> None:
    async with grammars() as service:
        text = from_json(hostile.properties(300))
        rows = await asyncio.gather(*[service.constraint(text, f"t{i}") for i in range(20)])
        assert len({row.allowed([]) for row in rows}) == 1
        assert service.kept == 1


# Hostile grammars


HOSTILE = {
    "deep references": from_json(hostile.ref_chain(4_000)),
    "deep properties": from_json(hostile.property_chain(3_000)),
    "deep rules": from_lark(hostile.rule_chain(12_000)),
    "deep terminals": from_lark(hostile.terminal_chain(12_000)),
    "a product of automata": from_json(hostile.multiples(7919, 7907)),
    "many patterns": from_json(hostile.patterns(5, 24)),
    "many properties": from_json(hostile.properties(8_000)),
    "a large enumeration": from_json(hostile.enumeration(12_000)),
    "repetitions of repetitions": from_regex("((a{1000}){1000}){1000}"),
    "deep groups": from_regex("(" * 30_000 + "a" + ")" * 30_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_grammar_compiles_or_is_refused_and_others_go_on(name: str) -> None:
    async with grammars() as service:
        honest = await service.constraint(from_regex("ab|cd"), None)
        before = honest.allowed([])
        attack = asyncio.create_task(_outcome(service, HOSTILE[name], "attacker"))
        while not attack.done():
            await asyncio.sleep(0.01)
            assert honest.allowed([]) == before
        assert attack.result() in (None, RequestInvalid)
        assert (await service.constraint(from_regex("xy"), None)).allowed([])


async def _outcome(service: Grammars, text: str, tenant: str | None) -> type[AioEngineError] | None:
    try:
        await service.constraint(text, tenant)
    except RequestInvalid:
        return RequestInvalid
    except AioEngineError as error:
        return type(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "limits", "what"),
    [
        (hostile.multiples(7919, 7907), {"memory": 1024 * MiB}, "0.5 s of processor time"),
        (hostile.multiples(7919, 7907), {"compile_seconds": 30.0, "memory": 20 * MiB}, "20 MiB"),
        (
            hostile.property_chain(20_000),
            {"compile_seconds": 60.0, "memory": 2048 * MiB, "max_characters": 2**22},
            "nested too deeply",
        ),
        (hostile.multiples(7919, 7907), {"compile_wall_seconds": 0.1}, "0.1 s"),
        (hostile.properties(100), {"max_characters": 1000}, "at most 1000"),
    ],
)
async def test_a_refusal_says_what_was_exceeded(text: str, limits: dict[str, Any], what: str) -> None:
    fields = {"compile_seconds": 0.5, **limits}
    async with grammars(bounds(**fields)) as service:
        with pytest.raises(RequestInvalid, match=what):
            await service.constraint(from_json(text), None)


@pytest.mark.slow
async def test_who_asks_for_too_many_is_told_so() -> None:
    limits = bounds(compile_seconds=0.5, max_queued=2)
    async with grammars(limits) as service:
        texts = [from_json(hostile.multiples(7919 + i, 7907)) for i in range(6)]
        outcomes = [asyncio.create_task(_outcome(service, text, "a")) for text in texts]
        await until(lambda: service.waiting > 0)
        assert await _outcome(service, from_regex("x"), "b") is None
        assert EngineOverloaded in [await outcome for outcome in outcomes]


@pytest.mark.slow
async def test_what_is_slow_for_one_token_is_given_up() -> None:
    limits = bounds(mask_seconds=0.01)
    async with grammars(limits) as service:
        slow = await service.constraint(from_lark("start: e\ne: e e | e e e | e e e e | /[a-z]/"), None)
        honest = await service.constraint(from_regex("[ab]*"), None)
        outputs = [tokens("a" * length) for length in range(300)]
        with pytest.raises(ValueError, match=r"processor time for a token|Too many"):
            await asyncio.to_thread(lambda: [slow.allowed(output) for output in outputs])
        assert honest.allowed(tokens("ab"))


# Bounds on what is kept


async def test_few_are_kept_and_those_in_use_are_not_dropped() -> None:
    async with grammars(bounds(max_kept=6)) as service:
        used = [await service.constraint(from_regex(f"used{i}"), None) for i in range(3)]
        for i in range(10):
            await service.constraint(from_regex(f"unused{i}"), "c")
            assert service.kept <= 6
        assert all(constraint.allowed([]) for constraint in used)
        used += [await service.constraint(from_regex(f"more{i}"), None) for i in range(9)]
        assert service.kept == 12 and all(constraint.allowed([]) for constraint in used)


@pytest.mark.slow
async def test_all_together_take_bounded_memory() -> None:
    async with grammars(bounds(total_memory=8 * MiB)) as service:
        small = await service.constraint(from_regex("small"), None)
        large = [await service.constraint(from_json(hostile.enumeration(9_000 + i)), "a") for i in range(4)]
        await until(lambda: any(_fails(row) for row in large))
        assert small.allowed([])


def _fails(constraint: Any) -> bool:
    try:
        constraint.allowed([])
    except ValueError:
        return True
    return False


def is_set(mask: bytes, token: int) -> bool:
    return bool(mask[token // 8] >> token % 8 & 1)


class Counted(list[int]):
    """Tokens that count how many of them are read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.read += len(found) if isinstance(index, slice) else 1
        return found


async def test_a_token_costs_the_same_after_any_number_of_them() -> None:
    async with grammars() as service:
        constraint = await service.constraint(from_regex("(ab)*"), None)
        a, b = TOKENIZER.tokenize_str("a") + TOKENIZER.tokenize_str("b")
        history = Counted(b"a prompt")
        for count in range(300):
            output = OutputView(history, len(b"a prompt"))
            before = history.read
            constraint.begin(output)
            assert is_set(await mask(constraint, output), (a, b)[count % 2])
            assert history.read - before <= 4
            history.append((a, b)[count % 2])
        # Another output is read as a whole.
        assert is_set(await mask(constraint, OutputView([a, b, a])), b)


async def mask(constraint: Any, output: Sequence[int] = ()) -> bytes:
    """What is allowed, while the loop goes on."""
    async with asyncio.timeout(SECONDS):
        while (found := constraint.poll(output, 0.01)) is None:
            await asyncio.sleep(0.001)
    return bytes(found)


# Ends


@pytest.mark.parametrize("moment", ["waiting", "resuming"])
async def test_it_may_be_cancelled_at_any_point(moment: Moment) -> None:
    async with grammars() as service:
        count = 0

        async def work() -> None:
            nonlocal count
            count += 1
            await service.constraint(from_regex(f"a{count}"), None)

        async def after() -> None:
            assert not service.waiting

        assert await cancel_everywhere(work, moment, after) >= 1
        assert (await service.constraint(from_regex("ab"), None)).allowed([])


async def test_a_compile_for_which_nobody_waits_is_given_up() -> None:
    async with grammars(bounds(compile_seconds=60.0)) as service:
        text = from_json(hostile.multiples(7919, 7907))
        waiters = [asyncio.create_task(service.constraint(text, "a")) for _ in range(3)]
        await until(lambda: trials() != [])
        [process] = trials()
        waiters[0].cancel()
        await asyncio.wait(waiters[:1])
        assert service.waiting and process.is_running(), "two still wait"
        for waiter in waiters:
            waiter.cancel()
        await until(lambda: not trials())
        assert (await service.constraint(from_regex("ab"), None)).allowed([])


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux shares out the processors")
async def test_compiles_give_way_to_the_engine() -> None:
    async with grammars(bounds()) as service:
        long = asyncio.create_task(service.constraint(from_json(hostile.multiples(7919, 7907)), None))

        def niceness() -> int:
            found = [-20]
            for child in trials():
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it has ended
                    found.append(os.getpriority(os.PRIO_PROCESS, child.pid))
            return max(found)

        assert (await service.constraint(from_regex("ab"), None)).allowed([])
        await until(lambda: niceness() > os.getpriority(os.PRIO_PROCESS, 0))
        # It counts within a session only, where the kernel's "autogroup" is on.
        assert os.getsid(worker().pid) == os.getsid(0)
        assert os.getpgid(worker().pid) == worker().pid, "Ctrl-C is not for it"
        long.cancel()


async def test_a_killed_worker_is_replaced_and_all_rows_go_on() -> None:
    async with grammars() as service:
        first = await service.constraint(from_regex("ab"), None)
        second = await service.constraint(from_regex("cd"), "b")
        expected = await mask(first, tokens("a"))
        for _ in range(4):
            worker().kill()
            await until(lambda: service.kept == 0)
            await until(lambda: service.kept == 2)
            assert await mask(first, tokens("")) != expected
            assert await mask(first, tokens("a")) == expected
            assert await mask(second)
        assert (await service.constraint(from_regex("ab"), None)).allowed([])


async def test_a_worker_that_is_killed_in_a_compile_is_replaced() -> None:
    async with grammars() as service:
        first = await service.constraint(from_regex("ab"), None)
        second = asyncio.create_task(service.constraint(from_json(hostile.properties(1000)), None))
        await until(lambda: trials() != [])
        worker().kill()
        assert await mask(first)
        assert (await second).allowed([])


async def test_a_text_that_ends_the_worker_again_and_again_is_refused() -> None:
    """... and the others go on."""
    async with grammars() as service:
        honest = await service.constraint(from_regex("cd"), "b")
        text = from_lark(hostile.AMBIGUOUS)
        row = await service.constraint(text, "a")
        for _ in range(MAX_ENDS):
            await until(lambda: service.kept == 2)
            assert await mask(row)
            place = service._kept[text].place
            os.kill(worker().pid, signal.SIGSTOP)
            os.pwrite(place.worker._notes.fileno(), TEXT.pack(place.number), 0)  # it is busy with the text
            worker().kill()
            await until(lambda: service.kept == 0)
        with pytest.raises(ValueError, match="ended the process"):
            await mask(row, tokens("a"))
        assert await mask(honest)
        with pytest.raises(RequestInvalid, match="ended the process"):
            await service.constraint(text, "c")


async def test_those_who_wait_learn_that_it_is_closed() -> None:
    async with grammars(bounds(compile_seconds=60.0)) as service:
        waiter = asyncio.create_task(service.constraint(from_json(hostile.multiples(7919, 7907)), None))
        kept = await service.constraint(from_regex("ab"), None)
        await service.close()
        with pytest.raises(EngineStopped):
            await waiter
        with pytest.raises(ValueError, match="stopped"):
            kept.allowed([])
        with pytest.raises(EngineStopped):
            await service.constraint(from_regex("ab"), None)


_ENGINE = """
import asyncio, sys
sys.path[:0] = {path!r}
from grammars.test_service import *

async def main():
    limits = bounds(compile_seconds=600)
    service = Grammars(lambda: JSON, 256, [EOS], limits=limits)
    kept = await service.constraint(from_regex("ab"), None)
    long = asyncio.create_task(service.constraint(from_json(hostile.multiples(7919, 7907)), None))
    await until(lambda: len(trials()) == 1)
    print(worker().pid, *(process.pid for process in trials()), flush=True)
    await long

asyncio.run(main())
"""


@pytest.mark.slow
async def test_all_end_with_a_parent_that_is_killed() -> None:
    script = _ENGINE.format(path=sys.path)
    engine = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script), stdout=asyncio.subprocess.PIPE
    )
    assert engine.stdout is not None
    pids = list(map(int, (await engine.stdout.readline()).split()))
    assert len(pids) == 2
    engine.kill()
    await engine.wait()
    await until(lambda: all(_has_ended(pid) for pid in pids))


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # where nobody collects orphans
    except psutil.NoSuchProcess:
        return True
