"""Finds a running fleet by its name, on the cluster of ``RAY_ADDRESS`` or on those of this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aioengine.errors import AioEngineError, ConfigError, EngineStopped
from aioengine.fleet.cluster import (
    TRANSPORT,
    address,
    check_address,
    current_address,
    first_line,
    require_ray,
)
from aioengine.fleet.registry import NAMESPACE, fleets_of_cluster

_FLAG = b"--gcs-address="
WHERE = (
    "--app-name names another fleet, RAY_ADDRESS another cluster (the fleet's server logs it when it starts)"
)


def existing_fleet(name: str) -> Any:
    """Return Serve's handle of the replicas of a running fleet. Without ``RAY_ADDRESS``, searches each Ray
    cluster of this machine. Blocks. Raises ConfigError if no cluster has the fleet."""
    require_ray()
    os.environ.update(
        {**TRANSPORT, "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1"}
    )  # because this process waits for results
    named = address()
    if named is not None:
        check_address(named)
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if not ray.is_initialized():
        _join(name, local_clusters() or ["auto"] if named is None else [named])
    return serve.get_deployment_handle("EngineReplica", name)


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Raise EngineStopped in place of what Ray and Serve raise while a fleet starts or ends."""
    try:
        yield
    except AioEngineError:
        raise
    except Exception as error:
        raise EngineStopped(
            f"fleet {name!r} does not answer ({type(error).__name__}: {first_line(error)}); if it starts or "
            "ends now, try again in a moment, else its server's log says why"
        ) from error


def local_clusters() -> list[str]:
    """Return the addresses of the Ray clusters with a node on this machine, from their processes' command
    lines."""
    found: set[str] = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        found |= {word.removeprefix(_FLAG).decode() for word in words if word.startswith(_FLAG)}
    return sorted(found)


def _join(name: str, clusters: Sequence[str]) -> None:
    """Connect this process to the cluster that has the fleet. Raises ConfigError if not exactly one has
    it."""
    import ray

    refused: list[str] = []
    having: list[str] = []
    for cluster in clusters:
        try:
            check_address(cluster)
            _connect(cluster)
            there = fleets_of_cluster()
            if name in there:
                having.append(cluster)
                if len(clusters) == 1:
                    return
            else:
                refused.append(f"the cluster at {current_address()} has {', '.join(there) or 'none'}")
        except Exception as error:
            refused.append(f"{cluster}: {first_line(error)}")
        ray.shutdown()
    if not having:
        raise ConfigError(f"there is no fleet {name!r} ({'; '.join(refused)}); {WHERE}")
    if len(having) > 1:
        raise ConfigError(
            f"there is a fleet {name!r} on several clusters of this machine: {', '.join(having)}; set "
            "RAY_ADDRESS to one of them"
        )
    _connect(having[0])


def _connect(cluster: str) -> None:
    import ray

    ray.init(address=cluster, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
