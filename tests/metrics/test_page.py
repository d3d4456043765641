"""The live page in a real browser: headless Chromium against a running engine."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from support.engine_fixtures import MakeEngine, Tiny, greedy, make_engine, prompt_of, tiny, tiny_of  # noqa: F401
from support.page_engine import Told, serve_page

from aioengine import AdapterInfo, AsyncEngine, EngineStats

api = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian package chromium)"),
    pytest.mark.asyncio(loop_scope="module"),
]

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
LIMIT = 20_000
"""Milliseconds that any one condition may take to become true."""


BrowserPage = Callable[..., AbstractAsyncContextManager[Any]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Any]:
    async with api.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
def browser_page(browser: Any) -> BrowserPage:
    """``browser_page(url, expected=(), **context)``: the page, opened, with nothing that another one has
    stored; at the end nothing unexpected may be on its console as an error."""

    @asynccontextmanager
    async def opened(url: str, expected: tuple[str, ...] = (), **context: Any) -> AsyncIterator[Any]:
        errors: list[str] = []
        async with await browser.new_page(viewport={"width": 1280, "height": 800}, **context) as page:
            page.set_default_timeout(LIMIT)
            page.on("console", lambda said: said.type in ("error", "warning") and errors.append(said.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            await page.goto(url)
            yield page
        assert [error for error in errors if not any(code in error for code in expected)] == []

    return opened


def shows(page: Any, selector: str, text: str) -> Any:
    return api.expect(page.locator(selector).first).to_contain_text(text, timeout=LIMIT)


@pytest_asyncio.fixture(loop_scope="module")
async def engine(make_engine: MakeEngine, tiny: Tiny) -> AsyncIterator[AsyncEngine]:  # noqa: F811
    async with make_engine(tiny) as engine:
        for name in ("rank-3", "rank-4", "qv-only"):
            engine.register_adapter(name, tiny.adapters[name])
        yield engine


DRAWN = """async (names) => { // whether the timeline has bars in the colours of all these adapters
  const { hue } = await import("./assets/format.js");
  const theme = getComputedStyle(document.documentElement);
  const [lightness, chroma] = ["--fill-l", "--fill-c"].map((name) => theme.getPropertyValue(name));
  const canvas = document.getElementById("canvas");
  const [width, height] = [canvas.width, canvas.height];
  const probe = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  probe.drawImage(canvas, 0, 0);
  const drawn = new Set(new Uint32Array(probe.getImageData(0, 0, width, height).data.buffer));
  return names.every((name) => {
    probe.fillStyle = `oklch(${lightness} ${chroma} ${hue(name)})`;
    probe.fillRect(0, 0, 1, 1);
    return drawn.has(new Uint32Array(probe.getImageData(0, 0, 1, 1).data.buffer)[0]);
  });
}"""


async def drawn(page: Any, adapters: list[str]) -> None:
    async with asyncio.timeout(LIMIT / 1000):
        while not await page.evaluate(DRAWN, adapters):
            pass


@pytest.mark.slow
async def test_page_shows_a_swap_that_happens(engine: AsyncEngine, browser_page: BrowserPage) -> None:
    async with serve_page(engine, port=0) as url, browser_page(url) as page:
        await shows(page, "#connection", "Live")
        await shows(page, "#swaps", "None since")
        await shows(page, "#slot-names li >> nth=0", "free")
        await engine.complete(prompt_of(1, 6), greedy(4), adapter="rank-3")
        placed = page.locator('#swaps li[data-kind="placed"]')
        await api.expect(placed).to_have_count(1, timeout=LIMIT)
        slot = next(s.index for s in engine.stats().slots if s.adapter == "rank-3")
        await api.expect(placed).to_contain_text(f"CPU → slot {slot}")
        await api.expect(placed).to_contain_text("rank-3")
        await api.expect(placed.locator(".took")).to_have_text(re.compile(r"^[\d.]+ (µs|ms|s)$"))
        await shows(page, f"#slot-names li >> nth={slot}", "rank-3")
        await shows(page, "#chips", "rank-3")
        await shows(page, "#running-sub", "1 finished")
        await api.expect(page.locator("#memory")).to_be_hidden()  # there is no strip for slots of one size
        await drawn(page, ["rank-3"])  # while it stays, its bar grows: soon it is wide enough to be seen
        for name in ("rank-4", "qv-only"):
            await engine.complete(prompt_of(2, 6), greedy(4), adapter=name)
        await api.expect(page.locator('#swaps li[data-kind="evicted"]')).to_have_count(1, timeout=LIMIT)
        await shows(page, '#swaps li[data-kind="evicted"]', f"left slot {slot}")
        await shows(page, f"#slot-names li >> nth={slot}", "qv-only")
        await shows(page, "#swaps-sub", "3 loads, 1 eviction")
        await drawn(page, ["rank-3", "rank-4", "qv-only"])
        assert not await page.evaluate(DRAWN, ["all-linear"])  # which was never in a slot


@pytest.mark.slow
async def test_a_strip_for_each_replica(engine: AsyncEngine, browser_page: BrowserPage) -> None:
    told = Told(engine)

    def change(stats: EngineStats) -> EngineStats:
        """Two replicas of the same slots."""
        slots = [
            msgspec.structs.replace(slot, replica=replica)
            for replica in ("east", "west")
            for slot in stats.slots
        ]
        first = msgspec.structs.replace(slots[2], state="READY", adapter="only-west", version=1)
        return msgspec.structs.replace(stats, slots=(*slots[:2], first, *slots[3:]))

    told.change_stats = change
    async with serve_page(told, port=0) as url, browser_page(url) as page:  # type: ignore[arg-type]
        await engine.complete(prompt_of(1, 6), greedy(4), adapter="rank-3")
        await shows(page, "#slot-names", "rank-3")
        await api.expect(page.locator("#slot-names .begins")).to_have_count(2, timeout=LIMIT)
        for index, words in ((0, "east"), (2, "west"), (2, "only-west")):
            await shows(page, f"#slot-names li >> nth={index}", words)
        numbers = await page.locator("#slot-names b").all_text_contents()
        assert numbers == ["0", "1", "0", "1"], "each replica counts its own"
        await drawn(page, ["only-west", "rank-3"])


BY_BYTES = {
    "slot_memory": "300KiB",
    "max_loras": 4,
    "max_cpu_loras": 6,
    "max_model_len": 64,
    "kv_cache_memory": "300KiB",
}


@pytest.mark.slow
async def test_the_memory_of_the_slots_is_drawn_to_scale(
    make_engine: MakeEngine,  # noqa: F811
    tiny: Tiny,  # noqa: F811
    browser_page: BrowserPage,
) -> None:
    async with (
        make_engine(tiny, **BY_BYTES) as engine,
        serve_page(engine, port=0) as url,
        browser_page(url) as page,
    ):
        for name in ("rank-3", "all-modules"):
            engine.register_adapter(name, tiny.adapters[name])
            await engine.complete(prompt_of(1, 6), greedy(4), adapter=name)
        await shows(page, "#arena-sub", "2 adapters in")
        stats = engine.stats()
        parts = {slot.adapter: (slot.offset, slot.bytes) for slot in stats.slots if slot.adapter is not None}
        strip = await page.locator("#arena").bounding_box()
        for name, (offset, size) in parts.items():
            part = page.locator(f'#arena i[title^="{name}:"]')
            await api.expect(part).to_have_count(1, timeout=LIMIT)
            box = await part.bounding_box()
            assert box["x"] - strip["x"] == pytest.approx(
                offset / stats.slot_memory * strip["width"], abs=1.5
            )
            assert box["width"] == pytest.approx(size / stats.slot_memory * strip["width"], abs=1.5)
        said = await page.locator("#arena").get_attribute("aria-label")
        assert said == await page.locator("#arena-sub").text_content()


@pytest.mark.slow
async def test_loading_draining_and_queues(engine: AsyncEngine, browser_page: BrowserPage) -> None:
    told = Told(engine)
    async with serve_page(told, port=0) as url, browser_page(url) as page:  # type: ignore[arg-type]
        await shows(page, "#connection", "Live")
        await engine.complete(prompt_of(1, 6), greedy(4), adapter="rank-3")
        await shows(page, "#slot-names", "rank-3")

        def change(stats: EngineStats) -> EngineStats:
            first, second = stats.slots
            first = msgspec.structs.replace(first, state="DRAINING", adapter="old", version=7)
            second = msgspec.structs.replace(second, state="LOADING", adapter="new", version=1)
            return msgspec.structs.replace(
                stats,
                slots=(first, second),
                waiting=1234,
                waiting_for_adapter=1000,
                kv_blocks=200,
                kv_blocks_free=150,
            )

        told.change_stats = change
        await engine.complete(prompt_of(1, 6), greedy(4))
        for index, words in enumerate((("old", "draining"), ("new", "loading"))):
            await shows(page, f"#slot-names li >> nth={index}", words[0])
            await shows(page, f"#slot-names li >> nth={index}", words[1])
        await shows(page, "#waiting", "1,234")
        await shows(page, "#waiting-sub", "1,000 for an adapter, 234 for room")
        await shows(page, "#kv", "25%")
        await page.hover("#canvas", position={"x": 10, "y": 10})  # before anything was known
        await api.expect(page.locator("#tip")).to_be_hidden()
        await page.evaluate("""() => {
          const canvas = document.getElementById("canvas");
          const { right, top } = canvas.getBoundingClientRect();
          const at = { clientX: right - 1, clientY: top + 20, bubbles: true };
          canvas.dispatchEvent(new PointerEvent("pointermove", at));
        }""")
        await shows(page, "#tip", "old version 7: draining")


@pytest.mark.slow
async def test_a_thousand_adapters(engine: AsyncEngine, tiny: Tiny, browser_page: BrowserPage) -> None:  # noqa: F811
    for index in range(997):
        engine.register_adapter(f"tenant-{index:04}", tiny.adapters["rank-3"])
    async with serve_page(engine, port=0) as url, browser_page(url) as page:
        await shows(page, "#count", "1,000")
        rows = page.locator("#adapters tbody tr[aria-rowindex]")
        assert 5 < await rows.count() < 60, "rows out of sight must not exist"
        assert await page.locator("#adapters").get_attribute("aria-rowcount") == "1001"
        took = await page.evaluate("""() => {
          const input = document.getElementById("filter");
          const start = performance.now();
          for (const text of ["t", "te", "tenant-", "tenant-07", "TENANT-077"]) {
            input.value = text;
            input.dispatchEvent(new Event("input"));
          }
          document.body.offsetHeight;
          return performance.now() - start;
        }""")
        assert took < 1000, f"five filters took {took:.0f} ms"
        await shows(page, "#count", "10 of 1,000")
        assert await rows.locator(".name").all_text_contents() == [f"tenant-077{i}" for i in range(10)]
        await page.fill("#filter", "no such name")
        await shows(page, "#adapters tbody", "No adapter matches.")
        await page.fill("#filter", "")
        await page.evaluate("document.getElementById('scroll').scrollTop = 1e9")
        await api.expect(rows.last).to_contain_text("tenant-0996", timeout=LIMIT)
        await page.click('th[data-sort="name"] button')
        await page.click('th[data-sort="name"] button')
        await api.expect(page.locator('th[data-sort="name"]')).to_have_attribute("aria-sort", "descending")
        await engine.load_adapter("tenant-0500")
        await page.select_option("#place", "cpu")
        await api.expect(rows).to_have_count(1, timeout=LIMIT)
        await api.expect(rows).to_contain_text("tenant-0500")


@pytest.mark.slow
async def test_names_are_text_whatever_they_contain(engine: AsyncEngine, browser_page: BrowserPage) -> None:
    name = "<img src=x onerror=\"document.title='broken in'\">&amp;</script>"
    told = Told(engine)

    def rename(infos: list[AdapterInfo]) -> list[AdapterInfo]:
        first, *rest = infos
        return [msgspec.structs.replace(first, name=name, location="cpu"), *rest]

    told.change_adapters = rename
    async with serve_page(told, port=0) as url, browser_page(url) as page:  # type: ignore[arg-type]
        await api.expect(page.locator("#adapters tbody .name").first).to_have_text(name, timeout=LIMIT)
        await api.expect(page.locator("#chips .name .name")).to_have_text(name)
        assert await page.locator("img").count() == 0 and await page.title() == "aioengine"


@pytest.mark.slow
async def test_lost_connection_is_plain_and_mends_itself(
    engine: AsyncEngine, browser_page: BrowserPage
) -> None:
    async with serve_page(engine, port=0) as url:
        port = int(url.rsplit(":", 1)[1].strip("/"))
        opened = browser_page(url, ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING"))
        page = await opened.__aenter__()
        await shows(page, "#connection", "Live")
    try:
        await shows(page, "#connection", "Connection lost")
        assert "lost" in await page.title()
        await engine.complete(prompt_of(1, 6), greedy(4), adapter="rank-3")  # meanwhile
        async with serve_page(engine, port=port):
            await shows(page, "#connection", "Live")
            await shows(page, "#slot-names", "rank-3")
            assert await page.title() == "aioengine"
    finally:
        await opened.__aexit__(None, None, None)
