"""docs/api.md says what the code does: the same calls, error codes and settings."""

from __future__ import annotations

import re
from pathlib import Path

from api.app import create_app
from api.errors import PROBLEMS
from api.settings import Settings, env_name, flag_name

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def test_calls() -> None:
    paths = create_app(Settings(store_url="memory://")).openapi()["paths"]
    built = {
        (method.upper(), path, operation["operationId"])
        for path, item in paths.items()
        for method, operation in item.items()
    }
    assert set(re.findall(r"^\| `([A-Z]+) (\S+)` \| `(\w+)` \|", PAGE, re.MULTILINE)) == built


def test_codes() -> None:
    told = {
        code: int(status)
        for status, codes in re.findall(r"^\| (\d{3}) \| (.+) \|$", PAGE, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert told == {code: problem.status for code, problem in PROBLEMS.items()}


def test_settings() -> None:
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory is not None or field.default is None else f"`{field.default}`"
        row = f"| `{flag_name(name, field)}` | `{env_name(name, field)}` | {default} | {field.description} |"
        assert row in PAGE.splitlines(), f"docs/api.md lacks: {row}"
    assert len(re.findall(r"^\| `--", PAGE, re.MULTILINE)) == len(Settings.model_fields)
