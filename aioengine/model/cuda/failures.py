"""Maps what torch, Triton and NCCL raise when a GPU fails to the package's errors, in one place.

Newer versions of torch have types and error codes; older ones, and libraries, only messages.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from aioengine import errors

_ADVICE: dict[type[errors.DeviceError], str] = {
    errors.DeviceOutOfMemory: "lower kv_cache_memory, max_num_batched_tokens or max_num_seqs, or end other "
    "programs that use the device",
    errors.DeviceError: "look at nvidia-smi, for Xid errors in the kernel's log, and at all logs. "
    "Only a new process can use the device again: executor='process' with restart='on-failure' starts one",
}
_FAILURE = re.compile(
    r"CUDA (driver )?error|CUDA out of memory|CUDA-capable|CUBLAS_STATUS|Triton Error|NVIDIA driver|NCCL"
    r"|Watchdog caught collective"
)
"""What a RuntimeError says if the device has failed."""
_NO_MEMORY = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation")
OUT_OF_MEMORY = 2
"""Code of cudaError_t (CUDA Runtime API, "Data types used by CUDA Runtime")."""


@contextlib.contextmanager
def typed_failures() -> Iterator[None]:
    """Raise a :class:`DeviceError` in the place of an exception that says that the device has failed."""
    try:
        yield
    except Exception as error:
        found = device_error(error)
        if found is None or found is error:
            raise
        raise found from error


def device_error(error: BaseException) -> errors.DeviceError | None:
    """Return the error of the package for ``error``, or for what it was raised from; None if that is no
    failure of a GPU."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, errors.AioEngineError):
            return at if isinstance(at, errors.DeviceError) else None
        if (kind := _kind(at)) is not None:
            lines = str(at).strip().splitlines()
            found = kind(f"{kind.__name__}: {lines[0][:500] if lines else ''}; {_ADVICE[kind]}")
            found.__cause__ = error
            return found
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return None


def copy_error(error: BaseException) -> errors.DeviceError | None:
    """Return the failure of the device that ended a copy into a slot; None if only the adapter fails, for
    example because there is too little memory for it."""
    found = device_error(error)
    return None if isinstance(found, errors.DeviceOutOfMemory) else found


def _kind(error: BaseException) -> type[errors.DeviceError] | None:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    accelerator = getattr(torch, "AcceleratorError", ())  # torch 2.8 and later
    lost = getattr(sys.modules.get("torch.distributed"), "DistBackendError", ())
    code = getattr(error, "error_code", None) if isinstance(error, accelerator) else None
    if isinstance(error, torch.OutOfMemoryError) or code == OUT_OF_MEMORY:
        return errors.DeviceOutOfMemory
    said = isinstance(error, RuntimeError) and _FAILURE.search(str(error))
    if not said and not isinstance(error, (accelerator, lost)):
        return None
    return errors.DeviceOutOfMemory if _NO_MEMORY.search(str(error)) else errors.DeviceError
