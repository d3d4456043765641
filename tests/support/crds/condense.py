"""Makes the schemas of this folder from the manifests that install custom resources; README.md says which.

    python tests/support/crds/condense.py CRD.yaml ...

What is for people or for the API server alone is left out: descriptions, defaults, rules in CEL, ``status``,
older versions. A pod template is any object here, because Kubernetes' own schema checks it. Fields that a
schema does not name are refused, as ``kubectl --validate=strict`` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_ANY = {"type": "object"}
_LEFT_OUT = {"description", "default"}


def condensed(crd: dict[str, Any]) -> dict[str, Any]:
    """The schema of a custom resource's version ``v1``."""
    spec = crd["spec"]
    [version] = [version for version in spec["versions"] if version["name"] == "v1"]
    schema: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"] |= {
        "apiVersion": {"const": f"{spec['group']}/v1"},
        "kind": {"const": spec["names"]["kind"]},
        "metadata": _ANY,
    }
    schema["properties"].pop("status", None)
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        name: _strict(part)
        for name, part in schema.items()
        if name not in _LEFT_OUT and name != "properties" and not name.startswith("x-kubernetes-")
    }
    if schema.get("x-kubernetes-int-or-string"):
        found = {"type": ["integer", "string"]}
    if "properties" in schema:
        pod = {"containers", "initContainers"} <= schema["properties"].get("spec", {}).get(
            "properties", {}
        ).keys()
        if pod:
            return _ANY
        found["properties"] = {name: _strict(part) for name, part in schema["properties"].items()}
        found.setdefault("additionalProperties", False)
    return found


def main() -> None:
    for file in sys.argv[1:]:
        crd = yaml.safe_load(Path(file).read_text())
        target = Path(__file__).with_name(f"{crd['spec']['names']['kind']}.json")
        target.write_text(json.dumps(condensed(crd), separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
