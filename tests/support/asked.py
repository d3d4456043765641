"""What the host asks of tensors: on a GPU each question waits for the device."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class Asked(TorchFunctionMode):
    """Notes what the host asks of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("tolist", "item", "nonzero", "__bool__", "__int__", "__float__", "cpu"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
