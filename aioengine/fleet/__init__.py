"""A fleet: several replicas of one engine behind one gateway, on Ray (extra ``fleet``).

:data:`app` is a Serve application, built at first use from the TOML file that ``AIOENGINE_CONFIG`` names:
``serve run aioengine.fleet:app``. Importing this package imports neither Ray nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioengine.fleet.config import FleetConfig

if TYPE_CHECKING:
    from ray.serve import Application

    app: Application

__all__ = ["FleetConfig", "app", "build_app"]


def build_app(config: FleetConfig) -> Application:
    """Build a Serve application of ``config.replicas`` engines and a gateway in front of them. Deploy it with
    ``serve.run`` or ``serve build``.

    Raises ConfigError if Ray is missing or has another version, or if the configuration is not valid.
    """
    from aioengine.fleet.deployment import fleet_application

    return fleet_application(config)


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()["app"] = build_app(FleetConfig.from_environment())
    return found
