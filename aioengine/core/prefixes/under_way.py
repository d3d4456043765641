"""Finds requests that can share what another one is about to compute."""

from __future__ import annotations

from collections.abc import Sequence

from aioengine.core.blocks import BlockManager
from aioengine.core.state import Request

WORTH_WAITING = 64
"""Tokens that a request has to be able to share, so that it waits for them."""


def is_under_way(request: Request, prompts: Sequence[Request], blocks: BlockManager) -> bool:
    """Whether ``request``, which waits, would compute what one of ``prompts`` computes before it: the next
    tokens of its own that are not in the prefix cache yet.

    All choices of a request have the same prompt, for example, and without this each that finds room would
    compute it in blocks of its own. What has no more tokens left comes first in each step, so waiting for it
    makes no request slower.
    """
    if not blocks.prefix_caching or not request.caches or request.unscored:
        return False
    before = [other for other in prompts if other.caches and other.remaining <= request.remaining]
    if not before:
        return False
    last = len(request.find_cached()) - (-WORTH_WAITING // blocks.block_size) - 1
    hashes = request.hashes
    return last < len(hashes) and any(
        other.committed <= last < len(other.hashes) and other.hashes[last] == hashes[last]
        for other in before  # with a window, one may have computed and lost what comes before its end
    )
