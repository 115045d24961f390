"""What is installed: the wheels' contents, versions, pins. The wheels are built for real, from what git would give."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from htm_service.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
"""pip's way to build without an isolated environment, so without a network."""


def build_wheel(source: Path, directory: Path) -> zipfile.ZipFile:
    """The wheel of a copy of `source`, because a build leaves files beside what it builds."""
    copy = directory / "source"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "tests", "docs", "bench")
    shutil.copytree(source, copy, ignore=left_out)
    run = subprocess.run(
        [sys.executable, "-c", BUILD, directory], cwd=copy, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return zipfile.ZipFile(directory / run.stdout.splitlines()[-1])


def files_of(source: Path, package: str) -> set[str]:
    return {
        path.relative_to(source).as_posix()
        for path in (source / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_wheel_holds_the_three_packages_whole(tmp_path: Path) -> None:
    with build_wheel(ROOT, tmp_path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"htm_service-{__version__}.dist-info/METADATA").decode()
        scripts = wheel.read(f"htm_service-{__version__}.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"api", "htm_service", "storage"}
    assert names == files_of(ROOT, "api") | files_of(ROOT, "htm_service") | files_of(ROOT, "storage")
    for package in ("api", "htm_service", "storage"):
        assert f"{package}/py.typed" in names
    assert {"api/ui/ui.html", "api/ui/app.js", "api/ui/style.css", "storage/migrations/env.py"} <= names
    assert any(name.startswith("storage/migrations/versions/v0001") for name in names)
    assert "Classifier: Private :: Do Not Upload" in metadata
    assert f"Version: {__version__}\n" in metadata
    assert "htm-service = api.cli:main" in scripts


def test_client_wheel_holds_the_client_alone(tmp_path: Path) -> None:
    with build_wheel(ROOT / "client", tmp_path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files_of(ROOT / "client", "htm_client")
    assert "htm_client/py.typed" in names


def test_one_version() -> None:
    released = re.findall(r"^## \[?(\d\S*?)\]? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == __version__
    assert CLIENT["project"]["version"] == __version__


def test_pins_are_within_what_the_project_allows() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {pin.name: next(iter(pin.specifier)) for pin in map(Requirement, lines)}
    assert list(pins) == ["psycopg", "psycopg-binary", "torch", "triton", "numba"]
    assert {pin.operator for pin in pins.values()} == {"=="}
    assert pins["psycopg"] == pins["psycopg-binary"]
    needed = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["postgresql"]]
    needed += PROJECT["project"]["optional-dependencies"]["dev"]
    for name in ("torch", "psycopg", "triton"):
        (requirement,) = (Requirement(text) for text in needed if text.startswith(name))
        assert requirement.specifier.contains(pins[name].version)


@pytest.mark.parametrize("name", ["dev", "demo", "ballet", "postgresql"])
def test_make_installs_the_extra(name: str) -> None:
    extras = re.search(r'-e "\.\[(.+?)\]" -e \./client', (ROOT / "Makefile").read_text())
    assert extras is not None
    assert name in extras[1].split(",")
    assert name in PROJECT["project"]["optional-dependencies"]


def test_ci_runs_what_developers_run() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\w+)$", script, re.MULTILINE) == ["check", "browser", "promtool", "test", "report"]
    assert "export REQUIRE_POSTGRESQL=1" in script, "where tests are left out in silence, nothing is tested"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize("project", [PROJECT, CLIENT], ids=["server", "client"])
def test_python_version_and_license(project: dict[str, dict[str, str]]) -> None:
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["project"]["license"] == "MIT"
