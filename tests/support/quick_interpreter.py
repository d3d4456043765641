"""Triton's interpreter, without work whose result it drops or has already; it computes the same."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


def quicken() -> None:
    """Changes Triton 3.9's interpreter, for the whole process; others only where they are like it."""
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

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _Patches(interpreter._patch_lang, (tl, tl.core))


class _Patches:
    """Replaces the language's functions by the interpreter's: for a kernel until it ends, and for a function
    that it calls for good. This is not done again where it has been done."""

    def __init__(self, patch: Any, modules: tuple[Any, ...]) -> None:
        self._patch = patch
        self._modules = modules
        self._for_good: set[str] = set()
        self._in_kernel: set[str] | None = None
        """What is replaced until the kernel that runs now ends."""

    def __call__(self, function: Any) -> Any:
        seen = function.__globals__.values()
        modules = {module.__name__ for module in self._modules if any(value is module for value in seen)}
        if self._in_kernel is not None:  # it is called by a kernel
            if not modules <= self._in_kernel | self._for_good:
                self._patch(function)
                self._for_good |= modules
            return None
        scope = self._patch(function)
        self._in_kernel = modules
        restore = scope.restore

        def ended() -> None:
            self._in_kernel = None
            restore()

        scope.restore = ended
        return scope
