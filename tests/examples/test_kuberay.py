"""The KubeRay example: it fits KubeRay's schema, its pods Kubernetes', its applications Serve's, its
configuration ours."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from support.custom_resources import check_resource

from aioengine.fleet import FleetConfig
from aioengine.fleet.cluster import TRANSPORT

FILE = Path(__file__).resolve().parents[2] / "examples" / "deploy" / "kuberay" / "rayservice.yaml"
MANIFESTS = {document["kind"]: document for document in yaml.safe_load_all(FILE.read_text())}
CLUSTER: dict[str, Any] = MANIFESTS["RayService"]["spec"]["rayClusterConfig"]
WORKERS: dict[str, Any] = CLUSTER["workerGroupSpecs"][0]
GROUPS = [CLUSTER["headGroupSpec"], WORKERS]


def test_the_service_fits_the_schema_of_kuberay() -> None:
    check_resource(MANIFESTS["RayService"])


@pytest.mark.parametrize("group", GROUPS, ids=["head", "workers"])
def test_pods_fit_the_schema_of_kubernetes(group: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    (container,) = group["template"]["spec"]["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert TRANSPORT.items() <= given.items(), "the same in all processes"


def test_the_application_fits_the_schema_of_serve() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray has no wheel for this system or Python")
    parsed = schema.ServeDeploySchema.model_validate(
        yaml.safe_load(MANIFESTS["RayService"]["spec"]["serveConfigV2"])
    )
    (application,) = parsed.applications
    assert application.import_path == "aioengine.fleet:app"


def test_the_configuration_is_good_and_fits_the_cluster() -> None:
    config = FleetConfig.from_dict(tomllib.loads(MANIFESTS["ConfigMap"]["data"]["fleet.toml"]))
    assert config.replicas == WORKERS["replicas"]
    (container,) = WORKERS["template"]["spec"]["containers"]
    assert int(container["resources"]["requests"]["cpu"]) == config.cpus_per_replica
