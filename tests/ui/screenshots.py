"""The pictures of the README, of a server that is at work: `python -m tests.ui.screenshots URL SESSION`. Not a test.

`make demo ARGS=--keep` leaves such a server; while this runs, somebody should ask it something.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.ui.conftest import FLAGS

DOCS = Path(__file__).parents[2] / "docs"
SECONDS_OF_PLOTS = 60


def main(url: str, session: str) -> None:
    """Write docs/page-session.png, light, and docs/page-server.png, dark."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        shots = (("light", f"/ui#/session/{session}", 3, 1_010), ("dark", "/ui#/server", SECONDS_OF_PLOTS, 720))
        for scheme, path, seconds, height in shots:
            size = {"width": 1280, "height": height}
            context = browser.new_context(viewport=size, color_scheme=scheme, locale="en-US")  # type: ignore[arg-type]
            page = context.new_page()
            page.goto(url + path)
            page.wait_for_timeout(seconds * 1_000)
            name = "page-session.png" if scheme == "light" else "page-server.png"
            page.screenshot(path=DOCS / name)
            print(f"{name}: {(DOCS / name).stat().st_size} bytes")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
