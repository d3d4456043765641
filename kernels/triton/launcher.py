"""Launches of kernels that have been launched before, without Triton's own way to each.

That way (``JITFunction.run``) takes the host longer than all else of a launch: it reads its settings from the
environment, binds arguments by name, and makes a text of all that a kernel is specialised on.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

Grid = tuple[int, int, int]

OPTIONS = {"enable_fp_fusion": True}
"""Of every kernel. Products are added without being rounded first; Triton's own default is to change in
3.10."""

_MOST = 4096
"""Keys that are kept: numbers that differ from step to step make new ones without end."""
_SAME = (
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
)
"""What ``JITFunction.run`` does with a compiled kernel, without spaces; it is done here in its place."""


class Launcher:
    """A kernel with values for its ``constants`` and options.

    Its parameters are tensors, then numbers, and then the constants. What is compiled for these is found by
    the tensors' dtypes, if all begin at multiples of 16 bytes, and the numbers themselves: Triton specialises
    on less. Everything else goes Triton's way: what is launched for the first time, tensors that begin
    elsewhere, Triton's hooks and interpreter, GPUs that are not NVIDIA's, and a Triton that launches in
    another way than is known here. Settings of Triton's are read at the first launch alone.
    """

    def __init__(self, kernel: Any, **constants: int) -> None:
        self._kernel, self._constants = kernel, constants | OPTIONS
        self._values: tuple[int, ...] = ()
        self._known: dict[tuple[object, ...], tuple[Any, ...]] = {}
        """By key how to run a compiled kernel, its function, its metadata, and itself, so that it is kept."""
        self._driver: Any = None
        """The driver whose compiled kernels are known."""
        self._is_known = isinstance(kernel, JITFunction) and _triton_is_known()
        if self._is_known:
            names = [name for name in kernel.arg_names if name in constants]
            self._values = tuple(constants[name] for name in names)
            self._is_known = kernel.arg_names[len(kernel.arg_names) - len(names) :] == names

    def __call__(self, grid: Grid, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
        """Launch on the device of the first tensor."""
        index = tensors[0].device.index
        if not self._is_known:
            if index is None or index == torch.cuda.current_device():
                self._kernel[grid](*tensors, *numbers, **self._constants)
            else:
                self._there(index, grid, tensors, numbers)
            return
        active: Any = driver.active
        device = active.get_current_device()
        if index is not None and index != device:
            self._there(index, grid, tensors, numbers)
            return
        address = 0
        for tensor in tensors:
            address |= tensor.data_ptr()
        key = (device, numbers, *map(type, numbers), *[tensor.dtype for tensor in tensors])
        found = self._known.get(key)
        if found is None or address & 15 or active is not self._driver or self._is_watched():
            self._usually(active, None if address & 15 else key, grid, tensors, numbers)
            return
        run, function, metadata, _ = found
        stream = active.get_current_stream(device)
        run(*grid, stream, function, metadata, None, None, None, *tensors, *numbers, *self._values)

    def _there(self, index: int, *launch: Any) -> None:
        """Launch on another device than the current one, which is the one that Triton uses."""
        with torch.cuda.device(index):
            self(*launch)

    def _is_watched(self) -> bool:
        """Whether hooks of Triton's are to be called."""
        runtime = _runtime()
        return bool(
            self._kernel.pre_run_hooks
            or getattr(runtime, "add_stages_inspection_hook", None)  # since Triton 3.6
            or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
            or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        )

    def _usually(
        self,
        active: Any,
        key: tuple[object, ...] | None,
        grid: Grid,
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
    ) -> None:
        """Launch Triton's way, and keep what it has compiled under ``key``, if there is one."""
        compiled = self._kernel[grid](*tensors, *numbers, **self._constants)
        if key is None or compiled is None or active.get_current_target().backend != "cuda":
            return  # AMD's kernels are specialised on the sizes of tensors, too
        if active is not self._driver or len(self._known) >= _MOST:
            self._driver, self._known = active, {}
        self._known[key] = compiled.run, compiled.function, compiled.packed_metadata, compiled


@functools.cache
def _triton_is_known() -> bool:
    """Whether Triton launches what is compiled as :class:`Launcher` does."""
    try:
        source = "".join(inspect.getsource(JITFunction.run).split())
    except OSError:  # there are no sources
        return False
    return _SAME in source and _runtime() is not None


@functools.cache
def _runtime() -> Any:
    """Triton's settings of launches; None before Triton 3.4."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.runtime
