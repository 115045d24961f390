"""Every view at three widths, light and dark: axe-core finds nothing, nothing is cut off, and keys are enough."""

from __future__ import annotations

from typing import Any

import pytest
from htm_client import HTMClient
from playwright.sync_api import Page, expect

from tests.ui.test_page import fill, unit

WIDTHS = (375, 768, 1280)
CORNERS = (("light", 375), ("dark", 1280))
"""Where axe looks at the views whose parts are the same at every width: it takes a second each time."""
VIEWS = {"sessions": "/ui", "session": "/ui#/session/agent", "server": "/ui#/server", "docs": "/docs"}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_for_everyone(page: Page, client: HTMClient, axe: str, view: str) -> None:
    fill(client, "agent", labels={"user": "ana"}, ttl_s=500)
    client.recall("agent", unit(1), note="where is the milk?", top_k=3)
    page.goto(VIEWS[view])
    ready = {"sessions": "tr[data-id=agent]", "session": "#why .bars", "server": ".facts div", "docs": "details"}
    page.locator(ready[view]).first.wait_for()
    if view == "session":
        page.get_by_role("button", name="chunk 5").first.click()
        page.get_by_label("or a stored token").fill("5")
        page.get_by_role("button", name="Ask").click()
        page.locator("form.card + .card .hit").first.wait_for()
    if view == "docs":
        page.locator("summary", has_text="/explain").click()
    page.evaluate(axe)  # not a script element, which the page's policy refuses
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{view} is {wide} wide where {width} are there"
            if view in ("docs", "server") and (scheme, width) not in CORNERS:
                continue
            found: list[dict[str, Any]] = page.evaluate("async () => (await axe.run()).violations")
            told = [
                f"{view} {scheme} {width}: {one['id']}: {one['help']}: {node['target']} {node['failureSummary']}"
                for one in found
                for node in one["nodes"]
            ]
            assert not told, "\n".join(told)


def test_keys_are_enough(page: Page, client: HTMClient) -> None:
    fill(client, "agent")
    client.recall("agent", unit(1), note="where is the milk?", top_k=3)
    page.goto("/ui")
    page.locator("tr[data-id=agent]").wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.get_by_role("link", name="agent").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="agent", level=1)).to_be_focused()
    recall = page.locator(".recalls button").first
    recall.focus()
    page.keyboard.press("Space")
    expect(recall).to_have_attribute("aria-pressed", "true")
    button = page.get_by_role("button", name="Delete…")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Delete agent?")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(button).to_be_focused()
