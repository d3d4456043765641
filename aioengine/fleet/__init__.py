"""Many replicas of one engine behind one door, on Ray (extra ``fleet``).

:data:`app` is a Serve application, built from the TOML file that ``AIOENGINE_CONFIG`` names when it is first
asked for: ``serve run aioengine.fleet:app``. Importing this package imports neither Ray nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioengine.fleet.config import FleetConfig

if TYPE_CHECKING:
    from ray.serve import Application

    app: Application

__all__ = ["FleetConfig", "app", "build_app"]


def build_app(config: FleetConfig) -> Application:
    """A Serve application of ``config.replicas`` engines and a door in front of them, to be deployed with
    ``serve.run`` or ``serve build``.

    Raises ConfigError if Ray is missing or of another version, or the configuration is not right.
    """
    from aioengine.fleet.deployment import fleet_application

    return fleet_application(config)


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()["app"] = build_app(FleetConfig.from_environment())
    return found
