"""Maps what torch, Triton and NCCL raise when a GPU fails to the package's errors, in one place.

Newer versions of torch have types and error codes; older ones, and libraries, only messages.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

from aioengine import errors

_ADVICE: dict[type[errors.DeviceError], str] = {
    errors.DeviceOutOfMemory: "lower kv_cache_memory, max_num_batched_tokens or max_num_seqs, or end other "
    "programs that use the device",
    errors.DeviceError: "look at nvidia-smi, for Xid errors in the kernel's log, and at all logs. "
    "Only a new process can use the device again: executor='process' with restart='on-failure' starts one",
}
_MESSAGES: dict[type[errors.DeviceError], re.Pattern[str]] = {
    errors.DeviceOutOfMemory: re.compile(
        r"CUDA out of memory|(CUDA|NCCL|Triton).{0,80}out of memory|CUBLAS_STATUS_ALLOC_FAILED"
        r"|cudaErrorMemoryAllocation",
        re.IGNORECASE | re.DOTALL,
    ),
    errors.DeviceError: re.compile(
        r"no CUDA-capable device|CUDA-capable device(s|\(s\))? (is/)?are busy or unavailable"
        r"|fallen off the bus|CUDA.{0,80}invalid device ordinal|Found no NVIDIA driver"
        r"|NCCL (error|operation|communicator)|nccl(System|Internal|Remote|UnhandledCuda)Error"
        r"|Watchdog caught collective operation timeout|ProcessGroupNCCL.{0,200}(timed? ?out|abort)"
        r"|CUDA (driver )?error:|Triton Error \[CUDA\]|CUBLAS_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR"
        r"|NOT_INITIALIZED)|an illegal memory access was encountered|device-side assert triggered",
        re.IGNORECASE | re.DOTALL,
    ),
}
"""In the order in which they are tried."""
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
        kind = _by_type(at) or (_by_message(str(at)) if isinstance(at, RuntimeError) else None)
        if kind is not None:
            found = _made(kind, str(at))
            found.__cause__ = error
            return found
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return None


def copy_error(error: BaseException) -> errors.DeviceError | None:
    """Return the failure of the device that ended a copy into a slot; None if only the adapter fails, for
    example because there is too little memory for it."""
    found = device_error(error)
    return None if isinstance(found, errors.DeviceOutOfMemory) else found


def _by_type(error: BaseException) -> type[errors.DeviceError] | None:
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if isinstance(error, torch.OutOfMemoryError):
        return errors.DeviceOutOfMemory
    accelerator = getattr(torch, "AcceleratorError", None)  # torch 2.8 and later
    if accelerator is not None and isinstance(error, accelerator):
        out = getattr(error, "error_code", None) == OUT_OF_MEMORY
        return errors.DeviceOutOfMemory if out else _by_message(str(error)) or errors.DeviceError
    distributed = sys.modules.get("torch.distributed")
    lost = getattr(distributed, "DistBackendError", None)
    if lost is not None and isinstance(error, lost):
        return _by_message(str(error)) or errors.DeviceError
    return None


def _by_message(text: str) -> type[errors.DeviceError] | None:
    return next((kind for kind, pattern in _MESSAGES.items() if pattern.search(text)), None)


def _made(kind: type[errors.DeviceError], text: str) -> errors.DeviceError:
    lines = text.strip().splitlines()
    return kind(f"{kind.__name__}: {lines[0][:500] if lines else ''}; {_ADVICE[kind]}")
