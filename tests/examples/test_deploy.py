"""The deployment examples are valid, agree with each other, and with the program that they start."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.prometheus_operator import v1 as prometheus_operator
from support.custom_resources import check_resource
from support.tiny_models import build_model

from aioengine import AsyncEngine
from aioengine.cli.flags import DEFAULT_MODEL
from aioengine.cli.main import build_app
from aioengine.config import EngineConfig
from aioengine.server.app import create_app
from aioengine.server.settings import ServerSettings

DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"
UNIT = DEPLOY / "aioengine.service"
MANIFESTS = {
    document["kind"]: document
    for path in (DEPLOY / "kubernetes").glob("*.yaml")
    for document in yaml.safe_load_all(path.read_text())
}
POD: dict[str, Any] = MANIFESTS["Deployment"]["spec"]["template"]
CONTAINER: dict[str, Any] = POD["spec"]["containers"][0]


def server_flags(arguments: list[str]) -> Any:
    """What the command line makes of the arguments; it fails for a flag that there is not. The configuration
    file is not here."""
    text = re.sub(r"--config[= ]\S+", "", shlex.join(arguments))
    _, bound, _ = build_app().parse_args(shlex.split(text))
    return bound.arguments["server"]


@pytest.mark.parametrize(
    "kind", ["ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"]
)
def test_manifests_fit_the_schema_of_kubernetes(kind: str) -> None:
    kubernetes_validate.validate(MANIFESTS[kind], kubernetes_validate.latest_version(), strict=True)


def test_the_service_monitor_fits_the_operator() -> None:
    given = MANIFESTS["ServiceMonitor"]
    parsed = prometheus_operator.ServiceMonitor.model_validate(given)
    # Unknown fields are dropped, so what is given must come back whole.
    kept = parsed.model_dump(by_alias=True, exclude_unset=True, mode="json")
    assert kept["spec"] == given["spec"] and kept["kind"] == given["kind"]


def test_they_find_each_other() -> None:
    labels = POD["metadata"]["labels"]
    service, monitor = MANIFESTS["Service"], MANIFESTS["ServiceMonitor"]
    assert MANIFESTS["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (port,) = service["spec"]["ports"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == port["name"]
    assert port["targetPort"] in [port["name"] for port in CONTAINER["ports"]]
    mounted = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["spec"]["volumes"]}
    keys = server_flags(CONTAINER["args"]).keys
    [mount] = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "keys"]
    assert keys is not None and str(keys.parent) == mount["mountPath"]
    [volume] = [volume for volume in POD["spec"]["volumes"] if volume["name"] == "keys"]
    assert [item["path"] for item in volume["secret"]["items"]] == [keys.name]
    assert not POD["spec"]["enableServiceLinks"]
    assert MANIFESTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (spread,) = POD["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    scaler = MANIFESTS["HorizontalPodAutoscaler"]["spec"]
    scaled = scaler["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", MANIFESTS["Deployment"]["metadata"]["name"])
    assert scaler["minReplicas"] > 1 and "replicas" not in MANIFESTS["Deployment"]["spec"], (
        "applied again, it would undo what the autoscaler has decided"
    )


def test_the_readme_names_what_the_manifests_expect() -> None:
    """A claim or a secret that is not there leaves the pods pending, without a word in any log."""
    readme = (DEPLOY / "README.md").read_text()
    for volume in POD["spec"]["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert f"`{volume['persistentVolumeClaim']['claimName']}`" in readme
        if "secret" in volume:
            assert f"secret generic {volume['secret']['secretName']} " in readme


def test_the_pod_has_time_to_drain() -> None:
    flags = server_flags(CONTAINER["args"])
    assert [flags.port] == [port["containerPort"] for port in CONTAINER["ports"]]
    assert flags.host == "0.0.0.0"  # what a probe can reach
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["spec"]["terminationGracePeriodSeconds"] >= sleep + flags.grace_seconds + 10


async def test_probes_and_prometheus_ask_what_the_server_answers(tmp_path: Path) -> None:
    paths = {name: CONTAINER[name]["httpGet"]["path"] for name in ("livenessProbe", "readinessProbe")}
    assert paths == {"livenessProbe": "/health", "readinessProbe": "/ready"}
    asked = {*paths.values(), CONTAINER["startupProbe"]["httpGet"]["path"]}
    asked |= {endpoint["path"] for endpoint in MANIFESTS["ServiceMonitor"]["spec"]["endpoints"]}
    config = EngineConfig(model=str(build_model(tmp_path, "llama")), kv_cache_memory="1MiB", device="cpu")
    async with AsyncEngine(config) as engine:
        transport = httpx.ASGITransport(create_app(engine, ServerSettings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://pod") as client:
            for path in asked:
                assert (await client.get(path)).status_code == 200, path


def test_the_configurations_are_good() -> None:
    mounts = [mount["mountPath"] for mount in CONTAINER["volumeMounts"]]
    pod = tomllib.loads(MANIFESTS["ConfigMap"]["data"]["engine.toml"])
    for values in (pod, tomllib.loads((DEPLOY / "engine.toml").read_text())):
        config = EngineConfig.from_dict(values)
        assert config.lora is not None and config.lora.adapter_root is not None
    assert any(pod["model"].startswith(mount) for mount in mounts)
    assert pod["lora"]["adapter_root"] in mounts


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign] # keys as they are written
    parser.read_string(UNIT.read_text().replace("\\\n", " "))
    return parser["Service"]


def test_the_unit_starts_the_program_and_lets_it_drain() -> None:
    service = unit()
    program, *arguments = shlex.split(service["ExecStart"])
    assert program.endswith("/bin/aioengine")
    flags = server_flags(arguments)
    assert int(service["TimeoutStopSec"]) >= flags.drain_delay + flags.grace_seconds + 10
    assert str(flags.keys).endswith("/" + service["LoadCredential"].partition(":")[0])
    assert service["Type"] == "notify" and int(service["WatchdogSec"]) > 0


def analyzed(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """``verify`` wants a program that exists. An unhardened unit has an exposure level of 9.6 of 10."""
    path = tmp_path / "aioengine.service"
    path.write_text(UNIT.read_text().replace("/opt/aioengine/bin/aioengine", sys.executable))
    done = analyzed("verify", "--man=no", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    done = analyzed("security", "--offline=yes", "--threshold=20", str(UNIT))
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


def test_the_image_is_built_with_one_version_of_everything() -> None:
    """All packages that the image installs are in the constraints, in the version of the lock file."""
    locked = tomllib.loads((DEPLOY.parents[1] / "uv.lock").read_text())["package"]
    versions: dict[str, set[str]] = {}
    for package in locked:
        versions.setdefault(package["name"], set()).add(package.get("version", ""))
    (extras,) = re.findall(r'"/src\[([\w,]+)\]"', (DEPLOY / "Dockerfile").read_text())
    wanted: set[str] = set()
    new: list[dict[str, Any]] = [{"name": "aioengine", "extra": extras.split(",")}]
    while new:
        one = new.pop()
        wanted.add(one["name"])
        for package in (package for package in locked if package["name"] == one["name"]):
            needs = list(package.get("dependencies", ()))
            for extra in one.get("extra", ()):
                needs += package.get("optional-dependencies", {}).get(extra, ())
            here = [need for need in needs if not re.search("win32|emscripten", need.get("marker", ""))]
            new += [need for need in here if need["name"] not in wanted or "extra" in need]
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()[1:]
    pinned = [line.partition(" ;")[0].split("==") for line in lines]
    assert all(version in versions[name] for name, version in pinned)
    assert wanted <= {name for name, _ in pinned} | {"aioengine"}, "see `make lock`"


def test_the_image_is_built_on_one_base() -> None:
    """Both stages on the same image, which is named by its digest: a tag moves."""
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    [base] = [line.removeprefix("ARG BASE=") for line in lines if line.startswith("ARG BASE=")]
    assert re.fullmatch(r"python:3\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} == {"${BASE}"}


POOL, ROUTE = yaml.safe_load_all((DEPLOY / "gateway" / "inferencepool.yaml").read_text())


@pytest.mark.parametrize("resource", [POOL, ROUTE], ids=["pool", "route"])
def test_the_gateway_fits_the_schemas_of_its_projects(resource: dict[str, Any]) -> None:
    check_resource(resource)
    with pytest.raises(jsonschema.ValidationError, match="unknwon"):
        check_resource({**resource, "spec": {**resource["spec"], "unknwon": 1}})


def test_the_pool_is_that_of_the_deployment() -> None:
    pool, route = POOL, ROUTE
    assert pool["spec"]["selector"]["matchLabels"].items() <= POD["metadata"]["labels"].items()
    ports = {port["containerPort"] for port in CONTAINER["ports"]}
    assert {port["number"] for port in pool["spec"]["targetPorts"]} <= ports
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])
    arguments = [*CONTAINER["args"][1:], "--metrics-compat=vllm"]
    assert server_flags(["serve", *arguments])


def test_litellm_names_models_as_the_server_lists_them() -> None:
    models = yaml.safe_load((DEPLOY / "litellm.yaml").read_text())["model_list"]
    asked = [entry["litellm_params"]["model"] for entry in models]
    assert all(model.startswith("hosted_vllm/") for model in asked)
    assert f"hosted_vllm/{DEFAULT_MODEL}" in asked
    assert {entry["litellm_params"]["api_base"] for entry in models} == {"http://127.0.0.1:8000/v1"}
