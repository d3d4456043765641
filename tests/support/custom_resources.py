"""The schemas of Kubernetes' custom resources, as the API server has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMAS = Path(__file__).with_name("crds")


def check_resource(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError if it does not fit its kind's schema, unknown fields included."""
    schema = json.loads((SCHEMAS / f"{document['kind']}.json").read_text())
    jsonschema.validate(document, schema)
