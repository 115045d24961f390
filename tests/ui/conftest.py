"""A real Chromium on a real server; where they cannot be had, these tests say so and are left out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from htm_client import HTMClient
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.served.server import Server

AXE = Path(__file__).parents[2] / ".venv" / "npm" / "node_modules" / "axe-core" / "axe.min.js"
"""Where `make browser` puts it."""
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
"""A browser that asks nobody for anything, run by root or not."""
ABSENT = "/metrics"
"""What a server need not have, so that the browser's console may say so."""


def missing(what: str) -> None:
    """Fail where everything must be there, else leave the test out."""
    text = f"{what} is not there: make browser"
    if os.environ.get("REQUIRE_CHROMIUM"):
        pytest.fail(f"{text}; and REQUIRE_CHROMIUM is set")
    pytest.skip(text)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing("Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def axe() -> str:
    """The accessibility checks, as text."""
    if not AXE.is_file():
        missing("axe-core")
    return AXE.read_text()


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("ui"))
    server.start()
    yield server
    server.close()


ADMIN_KEY = "the-admins-key-of-the-tests"


@pytest.fixture(scope="package")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for keys."""
    server = Server(tmp_path_factory.mktemp("guarded"), environment={"HTM_API_KEY": ADMIN_KEY})
    server.start()
    yield server
    server.close()


@pytest.fixture
def client(server: Server) -> Iterator[HTMClient]:
    """A client of that server, of which every test starts with no session."""
    with HTMClient(server.url) as client:
        for session in list(client.sessions()):
            client.delete_session(session.id)
        yield client


@pytest.fixture
def troubled_page(browser: Browser, server: Server) -> Iterator[Page]:
    """A page of 1280 x 900 in English, for tests in which requests are refused."""
    context = browser.new_context(base_url=server.url, viewport={"width": 1280, "height": 900}, locale="en-US")
    page = context.new_page()
    page.set_default_timeout(8_000)
    yield page
    context.close()


@pytest.fixture
def page(troubled_page: Page) -> Iterator[Page]:
    """The same; what its console says of errors, of its policy's too, fails the test."""
    page, wrong = troubled_page, list[str]()

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.location["url"].endswith(ABSENT):
            wrong.append(f"{message.text} ({message.location['url']})")

    page.on("console", hear)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    assert not wrong, wrong
