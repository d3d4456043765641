"""A program that has Serve replace all replicas of a fleet, by its name, one after the other. The fleet is on
the cluster of ``RAY_ADDRESS``."""

from __future__ import annotations

import sys

import msgspec


def main() -> None:
    from aioengine.fleet.cluster import connect
    from aioengine.fleet.config import FleetConfig
    from aioengine.fleet.deployment import replica_application
    from aioengine.fleet.registry import registry_actor

    connect()
    import ray
    from ray import serve

    found = ray.get(registry_actor(sys.argv[1], None).configure.remote(b""))
    config = msgspec.json.decode(found, type=FleetConfig)
    other = msgspec.structs.replace(config, step_seconds=config.step_seconds + 1)
    application = replica_application(other, inherit=True)
    serve.run_many([serve.RunTarget(application, name=config.name, route_prefix=None)])


if __name__ == "__main__":
    main()
