"""What torch, Triton and NCCL raise when a GPU fails, as the package's errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aioengine.errors import AdapterLoadError, DeviceError, DeviceOutOfMemory, EngineDead
from aioengine.executors.process import wire
from aioengine.model.cuda.failures import copy_error, device_error, typed_failures

TYPED = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), DeviceOutOfMemory),
    (torch.OutOfMemoryError(""), DeviceOutOfMemory),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceError),
    (torch.AcceleratorError("something that is new"), DeviceError),
    (torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:94, unhandled"), DeviceError),
    (torch.distributed.DistBackendError("something that is new"), DeviceError),
]
MESSAGES = {
    DeviceOutOfMemory: [
        "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 79.11 GiB total capacity)",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
    ],
    DeviceError: [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: misaligned address",
        "CUDA error: unspecified launch failure",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "CUDA error: no CUDA-capable device is detected",
        "No CUDA-capable device is detected",
        "CUDA error: all CUDA-capable devices are busy or unavailable",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: invalid device ordinal",
        "Found no NVIDIA driver on your system.",
        "NCCL error in: ProcessGroupNCCL.cpp:1333, unhandled system error",
        "NCCL communicator was aborted on rank 1.",
        "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)",
    ],
}  # fmt: skip
OTHERS = [
    ValueError("CUDA out of memory is what this text is about"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("shapes cannot be multiplied (2x3 and 4x5)"),
    MemoryError(),
    KeyError("cuda"),
]


def _cases() -> list[tuple[BaseException, type[DeviceError]]]:
    return [*TYPED, *((RuntimeError(text), kind) for kind, texts in MESSAGES.items() for text in texts)]


@pytest.mark.parametrize(("error", "kind"), _cases(), ids=lambda value: str(value)[:40])
def test_each_has_its_type(error: BaseException, kind: type[DeviceError]) -> None:
    found = device_error(error)
    assert type(found) is kind and isinstance(found, EngineDead) and found.__cause__ is error
    first = str(error).splitlines()[:1]
    assert kind.__name__ in str(found) and all(line in str(found) for line in first) and "; " in str(found)
    assert type(wire.unpack_error(wire.pack_error(found))) is kind  # it crosses to the engine's process


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_others_stay_what_they_are(error: Exception) -> None:
    assert device_error(error) is None
    with pytest.raises(type(error)), typed_failures():
        raise error


def test_codes_come_before_messages() -> None:
    codes = {2: DeviceOutOfMemory, 100: DeviceError, 700: DeviceError}
    for code, kind in codes.items():
        error = torch.AcceleratorError("CUDA error: a text in another language")
        error.error_code = code
        assert type(device_error(error)) is kind


@given(st.integers(0, 4), st.booleans(), st.sampled_from(_cases()))
def test_the_cause_is_found_through_what_was_raised_from_it(
    depth: int, said: bool, case: tuple[BaseException, type[DeviceError]]
) -> None:
    error, kind = case
    for number in range(depth):
        outer = KeyError(number)
        if said:
            outer.__cause__ = error
        else:
            outer.__context__ = error
        error = outer
    assert type(device_error(error)) is kind
    error.__context__ = error.__context__ or error  # a circle is no reason to hang
    assert type(device_error(error)) is kind


def test_an_error_of_the_package_says_already_what_it_is() -> None:
    adapter = AdapterLoadError("no memory", name="a")
    adapter.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert device_error(adapter) is None
    lost = DeviceError("gone")
    assert device_error(lost) is lost
    with pytest.raises(DeviceError) as caught, typed_failures():
        raise lost
    assert caught.value is lost and lost.__cause__ is None


def test_what_was_raised_in_place_of_a_failure_that_is_over_is_no_failure() -> None:
    later = RuntimeError("a size is wrong")
    later.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    later.__suppress_context__ = True  # as "from None" does
    assert device_error(later) is None


def test_too_little_memory_for_an_adapter_is_the_adapters_failure() -> None:
    assert copy_error(torch.OutOfMemoryError("CUDA out of memory")) is None
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert type(copy_error(fault)) is DeviceError
