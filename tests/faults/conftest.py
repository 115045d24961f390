"""Fast by default, `--full` by `make faults`; what the tests count becomes a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.faults.report import Tally, json_line, table
from tests.faults.scale import FAST, FULL, Scale
from tests.served.forked import ForkedServer
from tests.served.server import Server

FULL_SECONDS = 1_800
TALLIES = pytest.StashKey[list[Tally]]()
TALLY = pytest.StashKey[Tally]()

StartServer = Callable[..., Server]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="as many faults as docs/faults.md says")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLIES] = []


def is_full(config: pytest.Config) -> bool:
    return bool(config.getoption("--full", default=False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_full(config) and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(FULL_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" and TALLY in item.stash:
        item.stash[TALLY].outcome = report.outcome
        item.stash[TALLY].seconds = report.duration
    return report


def pytest_unconfigure(config: pytest.Config) -> None:
    """After everything that pytest itself prints, with `--full` or `-v`."""
    tallies, reporter = config.stash.get(TALLIES, []), config.pluginmanager.get_plugin("terminalreporter")
    if tallies and reporter is not None and (is_full(config) or config.option.verbose > 0):
        reporter.write_line(f"\n{table(tallies)}\n\n{json_line(tallies)}")


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> Scale:
    return FULL if is_full(request.config) else FAST


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Where a test counts; a row of the table."""
    tally = request.node.stash[TALLY] = Tally(request.node.name)
    request.config.stash[TALLIES].append(tally)
    return tally


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[StartServer]:
    """`start_server(*flags, ...)`: a running server with the arguments of `Server`; what is left of it is killed.

    It is forked, unless a command before it or its environment ask for a program of its own.
    """
    servers: list[Server] = []

    def start(*options: str, **arguments: object) -> Server:
        directory = tmp_path / f"server-{uuid4().hex}"  # several may be started at once
        directory.mkdir()
        kind = Server if {"before", "environment"} & set(arguments) else ForkedServer
        server = kind(directory, *options, **{"program": "api.cli", **arguments})  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.close()
