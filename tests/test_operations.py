"""docs/operations.md against the code: its constants, the errors and log lines it explains, its exit codes."""

import importlib
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli import build
from api.errors import PROBLEMS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()
SOURCES = "\n".join(
    path.read_text() for name in ("api", "htm_service", "storage") for path in (ROOT / name).rglob("*.py")
)


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(("name", "value"), re.findall(r"^\| `([\w.]+\.[A-Z_]+)` \| ([\d.]+) \|", PAGE, re.MULTILINE))
def test_constants(name: str, value: str) -> None:
    module, _, constant = name.rpartition(".")
    module = module if module.startswith("storage.") else f"htm_service.{module}"
    assert getattr(importlib.import_module(module), constant) == float(value)


def test_codes_that_are_not_the_callers_mistake() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", section("What it answers, and what to do"), re.MULTILINE))
    expected = {code for code, problem in PROBLEMS.items() if problem.status >= 500}
    assert told == expected | {"session_damaged", "session_expired"}


@pytest.mark.parametrize(
    ("level", "text"),
    re.findall(r"^\| (\w+) \| `(.+?)` \|", section("What it logs, and what to do"), re.MULTILINE),
)
def test_log_lines(level: str, text: str) -> None:
    assert text in SOURCES, f"nothing logs {text!r}"


def test_every_line_worth_a_look_is_explained() -> None:
    """Calls of the logger, from a warning on, whose text is in the call itself."""
    told = [text for _, text in re.findall(r"^\| (\w+) \| `(.+?)` \|", PAGE, re.MULTILINE)]
    logged = re.findall(r"\.(?:warning|error|exception|critical)\(\s*\"([^\"]+)\"", SOURCES)
    missing = [line for line in logged if not any(text in line for text in told)]
    assert set(missing) <= {"%s", "request %s failed: %s %s"}, "the last is `internal_error`'s"


def test_wrong_usage_has_the_exit_code_that_is_told() -> None:
    assert CliRunner().invoke(build(), ["serve", "--no-such-flag"]).exit_code == 2
    assert "| any | 2 | wrong usage" in PAGE


def test_figures_are_those_of_the_benchmarks() -> None:
    measured = re.findall(
        r"^\| S12 \|.*?\|[^|]*\| ([\d.]+) \|", (ROOT / "docs/benchmarks.md").read_text(), re.MULTILINE
    )
    assert len(measured) == 3
    for figure in measured:
        assert f"{figure} times" in section("How much room")
