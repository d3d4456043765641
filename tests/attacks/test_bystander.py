"""The bystander sees what the attack tests rely on it to see."""

from __future__ import annotations

import asyncio
import signal

import pytest
from support.bystander import bystander, memory
from support.engine_fixtures import Tiny
from support.server_process import serving


async def test_a_server_that_stands_still_or_goes_away_is_noticed(tiny_text: Tiny) -> None:
    async with serving(tiny_text.model, "--served-model-name", "tiny") as server:
        async with bystander(server.url) as quiet:
            await asyncio.sleep(0.2)
        quiet.check()
        async with bystander(server.url) as seen:
            server.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1.2)
            server.process.send_signal(signal.SIGCONT)
        assert not seen.errors
        with pytest.raises(AssertionError, match="waited"):
            seen.check()
        assert 0 < memory(server.process.pid) <= memory(server.process.pid, "VmHWM")
        async with bystander(server.url) as seen:
            server.process.kill()
            await server.process.wait()
        with pytest.raises(AssertionError):
            seen.check()
