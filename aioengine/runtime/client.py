"""EngineClient: the interface through which a server uses an engine. AsyncEngine and FleetClient have it."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Unpack

from aioengine.errors import EngineDead
from aioengine.info import AdapterInfo, EngineState
from aioengine.metrics.page.feed import ScrapedMetrics, WatchedEngine
from aioengine.request import Prompt, RequestKeywords, SamplingParams, TokenConstraint, Wanted
from aioengine.runtime.output import RequestOutput, SoFar
from aioengine.step import BytesLike

if TYPE_CHECKING:
    from aioengine.adapters.read_threads import SharedRead
    from aioengine.grammars.limits import GrammarLimits
    from aioengine.memory_plan import MemoryPlan
    from aioengine.metrics.collect.http import HttpMetrics
    from aioengine.model.text.tokenizer import Tokenizer
    from aioengine.runtime.text_work import TextWork


class GrammarCompiler(Protocol):
    """Makes constraints from grammars in llguidance's form."""

    limits: GrammarLimits

    async def constraint(self, text: str, tenant: str | None) -> TokenConstraint: ...


class Usage(NamedTuple):
    """Usage within one limit of a key, a tenant or an adapter."""

    requests: int = 0
    tokens: int = 0
    active: int = 0
    """Requests that are being answered now."""

    def then(self, later: Usage) -> Usage:
        """Return this and later usage together."""
        return Usage(self.requests + later.requests, self.tokens + later.tokens, later.active)


class ServerMetrics(ScrapedMetrics, Protocol):
    """Metrics that a server adds to: it reports each of its answers to ``http``."""

    http: HttpMetrics


class EngineClient(WatchedEngine, Protocol):
    """An engine, as a server uses it. ``AsyncEngine`` describes each method."""

    label_names: SharedRead[list[str]]
    """The model's ``id2label``; empty if it has none."""
    model_name: str
    model_path: Path | None
    plan: MemoryPlan
    tokenizer: Tokenizer | None
    text_work: TextWork
    leaving: bool

    @property
    def degraded(self) -> bool: ...
    @property
    def failure(self) -> EngineDead | None: ...
    @property
    def metrics(self) -> ServerMetrics: ...
    @property
    def state(self) -> EngineState: ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> AsyncGenerator[RequestOutput, None]: ...
    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        follow: Callable[[SoFar], None] | None = None,
        **keywords: Unpack[RequestKeywords],
    ) -> RequestOutput: ...

    def find_adapter(self, name: str) -> AdapterInfo | None: ...
    def count_adapters(self) -> int: ...
    async def head_labels(self, adapter: Wanted) -> int: ...
    async def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        pin: bool = False,
        replace: bool = False,
    ) -> AdapterInfo: ...
    async def load_adapter_files(
        self, name: str, config: bytes, weights: BytesLike, *, pin: bool = False, replace: bool = False
    ) -> AdapterInfo: ...
    async def unload_adapter(self, name: str, *, force: bool = False) -> None: ...
    async def pin_adapter(self, name: str, *, force: bool = False) -> AdapterInfo: ...
    async def unpin_adapter(self, name: str) -> AdapterInfo: ...

    def step_age(self) -> float: ...
    def limit_waiting(self, max_waiting: Mapping[str, int]) -> None: ...
    def share_limits(self, ledger: Any) -> None: ...
    def grammars(self, limits: GrammarLimits | None = None) -> GrammarCompiler: ...
