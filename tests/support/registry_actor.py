"""The fleet's registry in this process, with the interface of Ray's handle of its actor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from aioengine.fleet.registry import AdapterRegistry


class RegistryActor:
    """``made``: makes the actor's object, again after :meth:`restart`."""

    def __init__(self, made: Callable[[], AdapterRegistry] = lambda: AdapterRegistry(None)) -> None:
        self._made = made
        self._registry = made()
        self.answers: list[Any] = []
        """What it has answered, in order."""

    def restart(self) -> None:
        """As after the loss of its process."""
        self._registry = self._made()

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            try:
                answer = await getattr(self._registry, name)(*arguments)
            except Exception as error:
                from ray.exceptions import RayTaskError

                raise RayTaskError(name, "a traceback of many lines", error).as_instanceof_cause() from None
            self.answers.append(answer)
            return answer

        def remote(*arguments: Any) -> asyncio.Future[Any]:
            # As with Ray it begins at once, and goes on when its caller does not wait for it any more.
            return asyncio.shield(asyncio.ensure_future(call(*arguments)))

        return SimpleNamespace(remote=remote)


class FarRegistry:
    """The registry, as one gateway reaches it. ``seconds``: how long calls take, by name, and "any" for the
    others. ``asked``: when it was asked for changes."""

    def __init__(self, actor: Any, **seconds: float) -> None:
        self.seconds = seconds
        self.asked: list[float] = []
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            if name == "changes":
                self.asked.append(asyncio.get_running_loop().time())
            await asyncio.sleep(self.seconds.get(name, self.seconds.get("any", 0.0)))
            return await getattr(self._actor, name).remote(*arguments)

        return SimpleNamespace(remote=remote)
