"""Triton's interpreter, without work whose result it drops or has already; it computes the same."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch


def quicken() -> None:
    """Changes Triton 3.9's interpreter, for the whole process; others only where they are like it."""
    import triton
    from triton import language as tl
    from triton.runtime import interpreter

    # Whether an integer overflows is computed for each operation, and looked at only in debug mode.
    builder = interpreter.interpreter_builder
    if getattr(builder.options, "sanitize_overflow", False) and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # A table of all types is made at each look at one.
    numpy_type = getattr(interpreter, "_get_np_dtype", None)
    if numpy_type is not None:
        of_number = functools.cache(numpy_type)
        interpreter._get_np_dtype = lambda of: of_number(of) if type(of) is tl.dtype else numpy_type(of)

    if triton.__version__.startswith("3.9."):
        _keep_shapes(tl.core)

    executor = getattr(interpreter, "GridExecutor", None)
    if hasattr(executor, "_init_args_hst") and hasattr(executor, "_restore_args_dev"):
        _leave_arguments_where_they_are(executor)

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _Patches(interpreter, (tl, tl.core))


def _keep_shapes(core: Any) -> None:
    """A shape's types, sizes and products are made anew for each block, and once more for each tensor."""
    of_block, of_tensor = core.block_type.__init__, core.tensor.__init__
    shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    sizes: dict[int, tuple[Any, Any, Any]] = {}
    """By the identity of a block's shape, which is kept beside the tensor's number of elements and shape."""

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([size.value if type(size) is core.constexpr else size for size in shape])
        if key not in shapes:
            of_block(self, element_ty, shape)
            shapes[key] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, name = shapes[key]
        self.name = f"<{name}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        found = sizes.get(id(type.shape)) if type.is_block() else None
        if found is None:
            of_tensor(self, handle, type)
            if type.is_block():
                sizes[id(type.shape)] = type.shape, self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.numel, self.shape = found

    core.block_type.__init__, core.tensor.__init__ = block, tensor


def _leave_arguments_where_they_are(executor: Any) -> None:
    """Of each launch, all memory that its arguments are in is copied to the CPU, and back: where that is the
    same memory, onto itself."""
    to_cpu, back = executor._init_args_hst, executor._restore_args_dev

    def stays(value: object) -> bool:
        if isinstance(value, torch.Tensor):
            return value.device.type == "cpu"
        return isinstance(value, (bool, int, float))

    def arguments(self: Any, values: Any, named: Any) -> Any:
        if all(map(stays, (*values, *named.values()))):
            return values, named
        return to_cpu(self, values, named)

    def results(self: Any, values: Any, found: Any, named: Any, found_named: Any) -> None:
        if found is not values:
            back(self, values, found, named, found_named)

    executor._init_args_hst, executor._restore_args_dev = arguments, results


class _Patches:
    """Replaces the language's functions by the interpreter's: for a kernel until it ends, and for a function
    that it calls for good. It is not done again where it has been done, and what to replace is looked for
    once."""

    def __init__(self, interpreter: Any, modules: tuple[Any, ...]) -> None:
        self._patch, self._scope = interpreter._patch_lang, interpreter._LangPatchScope
        self._modules = modules
        self._found: dict[frozenset[str], list[tuple[Any, str, Any]]] = {}
        """Objects, names of their attributes, and what these become, by the modules that a kernel sees."""
        self._for_good: set[str] = set()
        self._in_kernel: frozenset[str] | None = None
        """What is replaced until the kernel that runs now ends."""

    def __call__(self, function: Any) -> Any:
        seen = function.__globals__.values()
        modules = frozenset(m.__name__ for m in self._modules if any(value is m for value in seen))
        if self._in_kernel is not None:  # it is called by a kernel
            if not modules <= self._in_kernel | self._for_good:
                self._patch(function)
                self._for_good |= modules
            return None
        if modules in self._found:
            scope = self._scope()
            for change in self._found[modules]:
                scope.set_attr(*change)
        else:
            scope = self._patch(function)
            self._found[modules] = [(of, name, vars(of)[name]) for of, name, _ in scope._changes]
        self._in_kernel = modules
        restore = scope.restore

        def ended() -> None:
            self._in_kernel = None
            restore()

        scope.restore = ended
        return scope
