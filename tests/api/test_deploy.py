"""deploy/: what Prometheus and Grafana read names metrics that there are, and says what an operator is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
ALERTS = yaml.safe_load((ROOT / "deploy" / "alerts.yml").read_text())["groups"][0]["rules"]
PANELS = json.loads((ROOT / "deploy" / "grafana.json").read_text())["panels"]


def metrics_in(expression: str) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bhtm_\w+", expression)}


def test_expressions_name_metrics_that_there_are() -> None:
    names = set(re.findall(r"^\| `(htm_\w+)", PAGE, re.MULTILINE))
    drawn = set().union(*(metrics_in(target["expr"]) for panel in PANELS for target in panel["targets"]))
    alarmed = set().union(*(metrics_in(rule["expr"]) for rule in ALERTS))
    assert drawn | alarmed <= names
    assert names - drawn == {"htm_build_info"}, "each has a place on the dashboard"


def test_every_alarm_is_explained() -> None:
    told = re.findall(r"^\| `(Htm\w+)` \| (\w+) \|", PAGE, re.MULTILINE)
    assert told == [(rule["alert"], rule["labels"]["severity"]) for rule in ALERTS]
    tested = (ROOT / "deploy" / "alerts_test.yml").read_text()
    assert all(len(re.findall(rf"alertname: {name}\b", tested)) == 2 for name, _ in told), "fires, and does not"


@pytest.fixture(scope="module")
def promtool() -> str:
    """The program; where it must be there and is not, that is a failure."""
    fetched = ROOT / ".venv" / "promtool" / "usr" / "bin" / "promtool"
    program = shutil.which("promtool") or shutil.which(fetched)
    if program is None and os.environ.get("REQUIRE_PROMTOOL"):
        pytest.fail("promtool is not there: make promtool; and REQUIRE_PROMTOOL is set")
    if program is None:
        pytest.skip("promtool is not there: make promtool")
    return program


@pytest.mark.parametrize(
    "command",
    [
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
        ["check", "config", "--syntax-only", "prometheus.yml"],
    ],
)
def test_promtool(promtool: str, command: list[str]) -> None:
    done = subprocess.run([promtool, *command], cwd=ROOT / "deploy", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
