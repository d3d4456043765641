"""A simulated core that does not forgive its policy."""

from __future__ import annotations

from support.core_sim import CoreSim

from aioengine import events


class StrictSim(CoreSim):
    """A policy that raises fails the test; the core itself would let its safe policy decide."""

    def take_events(self) -> None:
        for event in self.core.outbox:
            assert not isinstance(event, events.PolicyFailed), event.error
        super().take_events()
