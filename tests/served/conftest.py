"""One real server per test, or one for those of a module that leave nothing behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served.forked import ForkedServer
from tests.served.server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Forked, because importing its modules is most of what starting takes."""
    server = ForkedServer(tmp_path, program="api.cli")
    yield server
    server.close()


@pytest.fixture(scope="module")
def lasting_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It runs; for tests that end nothing but their own connections."""
    server = ForkedServer(tmp_path_factory.mktemp("server"), program="api.cli")
    server.start()
    yield server
    server.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Server]:
    """Started as anyone would."""
    server = Server(tmp_path)
    yield server
    server.close()
