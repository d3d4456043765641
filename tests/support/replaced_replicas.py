"""A program that has Serve replace all replicas of the fleet of ``RAY_ADDRESS``, one after the other."""

from __future__ import annotations

import msgspec


def main() -> None:
    from aioengine.fleet.cluster import connect
    from aioengine.fleet.config import FleetConfig
    from aioengine.fleet.deployment import replica_application
    from aioengine.fleet.registry import registry_actor

    connect()
    import ray
    from ray import serve

    found = ray.get(registry_actor("aioengine", None).configure.remote(b""))
    config = msgspec.json.decode(found, type=FleetConfig)
    other = msgspec.structs.replace(config, step_seconds=config.step_seconds + 1)
    application = replica_application(other, inherit=True)
    serve.run_many([serve.RunTarget(application, name=config.name, route_prefix=None)])


if __name__ == "__main__":
    main()
