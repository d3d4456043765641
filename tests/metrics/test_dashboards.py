"""The dashboard asks for metrics that an engine exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fleet_metrics import gateway_families
from support.promql import asked, series_names

from aioengine.info import EngineStats
from aioengine.metrics import EngineMetrics
from aioengine.metrics.families import definitions

FOLDER = Path(__file__).resolve().parents[2] / "metrics" / "dashboards"
BOARD: dict[str, Any] = json.loads((FOLDER / "aioengine.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]

LABELS = {label for definition in definitions.ALL.values() for label in definition.labels}
LABELS |= {"cause", "kind", "reason", "replica"}
"""Those of a fleet."""
MADE_BY_PROMETHEUS = {"instance", "job", "le"}
MADE_BY_EXPRESSIONS = {"row"}


@pytest.fixture(scope="module")
def exported() -> set[str]:
    zeros = {name: 0 for name in EngineStats.__struct_fields__ if name not in ("slots", "waiting_for")}
    metrics = EngineMetrics(10, lambda: EngineStats(slots=(), **zeros), list)
    metrics.export_process()
    return {*series_names(metrics.registry.collect()), *series_names(gateway_families())}


def expressions() -> Iterator[tuple[str, str]]:
    """(Where, PromQL) of every panel and of every variable."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"${variable['name']}", variable["query"]["query"]


@pytest.mark.parametrize(("where", "expr"), list(expressions()))
def test_expressions_use_what_is_exported(where: str, expr: str, exported: set[str]) -> None:
    call = expr.startswith("label_values(")
    found = asked(expr.removeprefix("label_values(").rpartition(",")[0] if call else expr)
    assert found.metrics, f"{where} asks for no metric"
    assert found.metrics <= exported
    assert found.labels <= LABELS | {"engine"} | MADE_BY_PROMETHEUS | MADE_BY_EXPRESSIONS


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_panels_are_complete(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        for variable in ("instance", "engine"):
            assert f'{variable}=~"${variable}"' in target["expr"]
