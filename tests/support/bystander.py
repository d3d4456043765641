"""A client that streams beside an attack, in a process of its own, and notes how it fared.

``async with bystander(url) as seen: ...`` streams greedy completions of one prompt back to back while the
body of the context runs; afterwards ``seen.check()`` fails if it had to wait, was refused, or got a text
that differs from the one that it had got before the attack began.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit


class Bystander:
    """What it saw. ``gaps`` are seconds from each event to the next, the first event of a stream counted
    from the last one of the stream before it."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.streams = 0
        self.errors: list[str] = []
        """Refusals, and texts that were not the first one."""

    @property
    def largest_gap(self) -> float:
        return max(self.gaps)

    def check(self, largest_gap: float = 1.0) -> None:
        assert not self.errors, self.errors[:3]
        assert self.streams > 0, "no stream came to its end"
        assert self.largest_gap < largest_gap, f"waited {self.largest_gap:.2f} s for an event"


@contextlib.asynccontextmanager
async def bystander(
    url: str,
    *,
    model: str = "tiny",
    key: str = "none",
    prompt: str = "Hello",
    max_tokens: int = 100,
    address: str = "127.0.0.1",
) -> AsyncIterator[Bystander]:
    """Asks from ``address``. Begins once a first stream is complete; the last one is waited for."""
    seen = Bystander()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        *(url, model, key, prompt, str(max_tokens), address),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n", "the bystander's first stream failed"
        yield seen
        process.stdin.close()
        async with asyncio.timeout(90):
            report = json.loads(await process.stdout.readline())
            await process.wait()
        seen.gaps, seen.streams, seen.errors = report["gaps"], report["streams"], report["errors"]
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.wait()


def memory(pid: int, field: str = "VmRSS") -> int:
    """Bytes that a process holds now; with ``field="VmHWM"`` the most that it has held."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{field} is not in /proc/{pid}/status")


def forget_peak(pid: int) -> None:
    """Makes "VmHWM" of a process begin again at what it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _stream_until_told(url: str, model: str, key: str, prompt: str, max_tokens: str, source: str) -> None:
    """The process's own part: standard library only, so that it starts at once."""
    body = {"model": model, "prompt": prompt, "max_tokens": int(max_tokens), "temperature": 0}
    data = json.dumps({**body, "stream": True, "ignore_eos": True})
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    address = urlsplit(url)
    gaps: list[float] = []

    def stream() -> str:
        nonlocal last
        connection = http.client.HTTPConnection(
            address.hostname or "", address.port, timeout=60, source_address=(source, 0)
        )
        text = ""
        try:
            connection.request("POST", "/v1/completions", data, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                return f"status {answer.status}: {answer.read(500)!r}"
            while (line := answer.readline()) != b"data: [DONE]\n":
                if not line:
                    return f"{text}, then the stream broke off"
                if line.startswith(b"data: "):
                    now = time.perf_counter()
                    gaps.append(now - last)
                    last = now
                    text += json.loads(line[6:])["choices"][0]["text"]
        except OSError as error:
            return f"{text}, then {error!r}"
        finally:
            connection.close()
        return text

    last = time.perf_counter()
    expected = stream()
    if not gaps:
        sys.exit(expected)
    print("ready", flush=True)
    told = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), told.set()), daemon=True).start()
    gaps.clear()
    last = time.perf_counter()
    streams, errors = 0, []
    while not (told.is_set() and streams):
        text = stream()
        streams += 1
        if text != expected:
            errors.append(f"{text!r} is not {expected!r}")
            if told.is_set() or len(errors) >= 100:
                break
    gaps.append(time.perf_counter() - last)
    print(json.dumps({"gaps": gaps, "streams": streams, "errors": errors[:20]}), flush=True)


if __name__ == "__main__":
    _stream_until_told(*sys.argv[1:])
