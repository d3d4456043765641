"""Metrics over HTTP from a thread, while the engine's own thread goes on changing them."""

from __future__ import annotations

import asyncio
import gzip
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.engine_fixtures import MakeEngine, Tiny, greedy, make_engine, tiny, tiny_of
from support.metric_script import ended, families, metrics

from aioengine.metrics import EngineMetrics, combined_registry, serve_metrics
from aioengine.metrics.collect.on_loop import OnLoop

__all__ = ["make_engine", "tiny", "tiny_of"]  # fixtures


def get(port: int, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, bytes, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers["Content-Type"]
    except urllib.error.HTTPError as error:
        return error.code, error.read(), ""


def test_formats_and_errors() -> None:
    made = metrics(ended("a"))
    with serve_metrics(SimpleNamespace(metrics=made), 0) as server:
        assert get(server.port) == (200, *made.expose())
        accept = "application/openmetrics-text"
        assert get(server.port, Accept=accept) == (200, *made.expose(accept))
        zipped = get(server.port, **{"Accept-Encoding": "gzip"})[1]
        assert gzip.decompress(zipped) == made.expose()[0]
        assert get(server.port, method="HEAD")[:2] == (200, b"")
        assert get(server.port, "/elsewhere")[0] == 404
        assert get(server.port, method="POST")[0] == 501
    with serve_metrics(made.registry, 0) as server:
        assert get(server.port)[1] == generate_latest(made.registry)


def test_closing_frees_the_port_and_the_thread() -> None:
    before = set(threading.enumerate())
    server = serve_metrics(metrics().registry, 0)
    port = server.port
    with pytest.raises(OSError, match="in use"):
        serve_metrics(metrics().registry, port)
    server.close()
    server.close()
    assert not [thread for thread in set(threading.enumerate()) - before if "metrics" in thread.name]
    serve_metrics(metrics().registry, port).close()


@pytest.mark.slow
async def test_scrapes_from_threads_while_the_engine_runs(tiny: Tiny, make_engine: MakeEngine) -> None:
    """Each must be of one moment: the slots add up, loads less evictions are the slots in use, and a
    histogram's count is its last bucket."""
    async with make_engine(tiny, max_loras=2, max_cpu_loras=3) as engine:
        names = [*tiny.adapters][:5]
        for name in names:
            engine.register_adapter(name, tiny.adapters[name])
        with serve_metrics(engine, 0) as server, ThreadPoolExecutor(3) as pool:
            loop = asyncio.get_running_loop()
            work = asyncio.gather(
                *(engine.complete([3, i], greedy(12), adapter=names[i % 5]) for i in range(20))
            )
            texts: list[str] = []
            while not work.done() or len(texts) < 12:
                answers = [loop.run_in_executor(pool, get, server.port) for _ in range(3)]
                for status, text, _ in await asyncio.gather(*answers):
                    assert status == 200
                    texts.append(text.decode())
            await work
    for text in texts:
        found = {
            (s.name, *(v for k, v in sorted(s.labels.items()) if k != "engine")): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }
        states = {key[1]: v for key, v in found.items() if key[0] == "aioengine_lora_slots"}
        assert sum(states.values()) == 2
        swaps = {key[1]: v for key, v in found.items() if key[0] == "aioengine_lora_swaps_total"}
        assert swaps["load"] - swaps["evict"] == states["ready"] + states["draining"]
        for name in ("aioengine_schedule_seconds", "aioengine_batch_sequences"):
            assert found[f"{name}_count",] == found[f"{name}_bucket", "+Inf"]


async def test_what_is_asked_for_runs_on_the_loops_thread_from_whatever_thread() -> None:
    on_loop = OnLoop()
    here = threading.get_ident()
    assert on_loop.call(threading.get_ident) == here
    assert await asyncio.to_thread(on_loop.call, threading.get_ident) == here

    def broken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await asyncio.to_thread(on_loop.call, broken)


async def test_a_loop_that_is_blocked_fails_the_scrape() -> None:
    on_loop = OnLoop(timeout=0.05)
    ended = threading.Event()
    errors: list[Exception] = []

    def scrape() -> None:
        try:
            on_loop.call(list)
        except TimeoutError as error:
            errors.append(error)
        ended.set()

    thread = threading.Thread(target=scrape)
    thread.start()
    assert ended.wait(10)  # on purpose: the loop stands still meanwhile
    thread.join()
    assert "did not answer within 0.05 s" in str(errors[0])


def test_after_the_loop_has_ended_the_last_state_is_served() -> None:
    async def make() -> EngineMetrics:
        return metrics(ended("a"))

    made = asyncio.run(make())
    with serve_metrics(made.registry, 0) as server:
        assert b'aioengine_prompt_tokens_total{adapter="a",engine="default"} 5.0' in get(server.port)[1]


def test_several_engines_in_one_scrape() -> None:
    one, two = (
        SimpleNamespace(metrics=EngineMetrics(10, metrics()._snapshot, list, engine=name))
        for name in ("one", "two")
    )
    one.metrics.handle(ended("a"))
    text = generate_latest(combined_registry(one, two)).decode()
    assert text.count("# TYPE aioengine_prompt_tokens_total ") == 1
    assert {f.name for f in text_string_to_metric_families(text)} == {f.name for f in families(metrics())}
    assert 'aioengine_prompt_tokens_total{adapter="a",engine="one"} 5.0' in text
    assert 'aioengine_requests_running{engine="two"} 0.0' in text
    with pytest.raises(ValueError, match=r"one, one.*EngineConfig\.name"):
        combined_registry(one, one)
