"""A kernel that does nothing, to find out whether any kernel can be launched."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def probe_kernel(
    out_ptr,  # [1]
):
    tl.store(out_ptr, 1)
