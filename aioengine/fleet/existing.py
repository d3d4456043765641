"""Finds a running fleet by its name, on the cluster of ``RAY_ADDRESS`` or on this machine's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aioengine.errors import AioEngineError, ConfigError, EngineStopped
from aioengine.fleet import cluster
from aioengine.fleet.registry import fleets_of_cluster

_WAITING = {
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # this process waits for results
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": "10",
}
"""Ray keeps the address of a cluster that was killed, and would try for a quarter of an hour to join it."""
WHERE = (
    "--app-name names another fleet, RAY_ADDRESS another cluster (the fleet's server logs it when it starts)"
)


def existing_fleet(name: str) -> Any:
    """Return Serve's handle of the replicas of a running fleet. Without ``RAY_ADDRESS``, it is looked for on
    the Ray cluster of this machine. Blocks. Raises ConfigError if the cluster does not have it."""
    cluster.require_ray()
    os.environ.update({**cluster.TRANSPORT, **_WAITING})
    named = cluster.address()
    if named is not None:
        cluster.check_address(named)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if not ray.is_initialized():
        try:
            ray.init(address=named or "auto", **cluster.JOINING)
        except Exception as error:
            raise ConfigError(f"there is no fleet {name!r} ({cluster.first_line(error)}); {WHERE}") from error
        there = fleets_of_cluster()
        if name not in there:
            what = f"the cluster at {cluster.current_address()} has {', '.join(there) or 'none'}"
            ray.shutdown()
            raise ConfigError(f"there is no fleet {name!r} ({what}); {WHERE}")
    return serve.get_deployment_handle("EngineReplica", name)


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Raise EngineStopped in place of what Ray and Serve raise while a fleet starts or ends."""
    try:
        yield
    except AioEngineError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {cluster.first_line(error)}"
        raise EngineStopped(
            f"fleet {name!r} does not answer ({what}); if it starts or ends now, try again in a moment, else "
            "its server's log says why"
        ) from error
