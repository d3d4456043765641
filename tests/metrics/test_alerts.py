"""The rules hold in promtool's eyes, and they ask for metrics that an engine exports."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics_core import Metric
from support.fleet_metrics import gateway_families
from support.promql import asked, series_names

from aioengine.info import EngineStats
from aioengine.metrics import EngineMetrics
from aioengine.metrics.families import definitions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "metrics" / "alerts"
RULES_FILE = FOLDER / "aioengine.rules.yml"
TESTS_FILE = FOLDER / "aioengine.test.yml"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load(RULES_FILE.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus"
)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


@needs_promtool
def test_promtool_finds_no_fault() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES_FILE)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.slow
def test_the_alerts_fire_when_they_should() -> None:
    done = promtool("test", "rules", TESTS_FILE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_in_which_it_fires() -> None:
    """Whose labels and text are compared, so that one that always fires is noticed as well."""
    cases = yaml.safe_load(TESTS_FILE.read_text(encoding="utf-8"))["tests"]
    checks = [check for case in cases for check in case.get("alert_rule_test", ())]
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == {a["alert"] for a in ALERTS}


def fresh() -> list[Metric]:
    """What an engine and a gateway export at first."""
    zeros = {name: 0 for name in EngineStats.__struct_fields__ if name not in ("slots", "waiting_for")}
    metrics = EngineMetrics(10, lambda: EngineStats(slots=(), **zeros), list)
    return [*metrics.registry.collect(), *gateway_families()]


def test_rules_use_what_is_exported() -> None:
    known = {"up", *series_names(fresh())}
    for rule in RULES:  # recorded ones are known to the rules after them
        assert asked(rule["expr"]).metrics <= known, rule
        if "record" in rule:
            known.add(rule["record"])


def test_counters_whose_increase_is_an_alert_begin_at_zero() -> None:
    """There is no increase in a series that begins with its first event: the alert would miss that one."""
    samples = {sample.name for family in fresh() for sample in family.samples if sample.value == 0}
    counters = {name for alert in ALERTS for name in re.findall(r"increase\((\w+)", alert["expr"])}
    assert counters and counters <= samples


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_alerts_say_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("warning", "critical")
    assert len(alert["annotations"]["summary"]) <= 90
    assert len(alert["annotations"]["description"]) >= 100


def test_every_alert_is_in_the_documentation() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(Aioengine\w+)`", page, flags=re.MULTILINE)) == {a["alert"] for a in ALERTS}


def test_the_runbook_has_a_section_for_every_alert() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert {section.split()[0] for section in sections} == {alert["alert"] for alert in ALERTS}
    for section in sections:
        assert all(f"**{part}:**" in section for part in ("Means", "Look at", "Do")), section


def test_every_alert_leads_to_its_section_of_the_runbook() -> None:
    pages = set()
    for alert in ALERTS:  # an anchor is the section's title in small letters
        page, anchor = alert["annotations"]["runbook_url"].split("#")
        assert anchor == alert["alert"].lower()
        pages.add(page)
    assert [page.rpartition("/")[2] for page in pages] == ["runbook.md"], pages


def test_the_runbook_speaks_of_metrics_that_there_are() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    exported = {definition.exposed for definition in definitions.ALL.values()} | set(
        series_names(gateway_families())
    )
    asked_for = set(re.findall(r"`((?:aioengine|process)_\w+)", page))
    assert asked_for and asked_for <= exported
