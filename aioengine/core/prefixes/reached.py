"""Pins the prefixes that a request asks for, as they are computed."""

from __future__ import annotations

from aioengine.core.blocks import BlockManager
from aioengine.core.state import Request


def pin_reached(request: Request, blocks: BlockManager, now: float) -> None:
    """Pin those of the request's ``cache_pins`` whose blocks are all in the prefix cache by now, once each.
    Tokens of a block that the pin covers in part are not kept."""
    size = blocks.block_size
    while request.pins and request.pins[-1].tokens // size <= request.committed:
        pin = request.pins.pop()
        prefix = request.hashes[: pin.tokens // size]
        count = blocks.pin(request.options.tenant, prefix, pin.seconds, now)
        request.pinned_tokens = max(request.pinned_tokens, count * size)
