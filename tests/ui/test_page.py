"""What a person does on the page, done in a browser: look, search, ask why, try, delete, sign in."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from htm_client import HTMClient
from playwright.sync_api import Page, Route, expect

from htm_service.attention.modules import HTMAttention
from tests.served.server import Server
from tests.ui.conftest import ADMIN_KEY

DIM = 16
NOTES = ["the key is under the mat", "milk is in the fridge", "the meeting is on friday"]


LIT = """() => {
  const canvas = document.querySelector("canvas");
  const hit = getComputedStyle(document.documentElement).getPropertyValue("--hit").trim();
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hit.slice(at, at + 2), 16));
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let found = 0;
  for (let at = 0; at < data.length; at += 4) found += data[at] === r && data[at + 1] === g && data[at + 2] === b;
  return found;
}"""
"""How many pixels of the strip have the colour of what a recall took."""


def unit(place: int) -> list[float]:
    return [float(place == at) for at in range(DIM)]


def fill(client: HTMClient, session: str, num_fillers: int = 60, **options: Any) -> None:
    """Sixty dull passages, and among them three notes, each its own direction."""
    client.create_session(session, dim=DIM, chunk_size=4, **options)
    rng = np.random.default_rng(3)
    tokens = 0.1 * rng.standard_normal((num_fillers, DIM)).astype(np.float32)
    payloads: list[dict[str, Any]] = [{"text": f"nothing happened ({place})"} for place in range(num_fillers)]
    for place, note in enumerate(NOTES):
        tokens[17 * place + 5] = unit(place)
        payloads[17 * place + 5] = {"text": note, "room": place}
    client.append(session, tokens, payloads)


def ids(page: Page) -> list[str]:
    return list(page.locator("tbody tr[data-id]").evaluate_all("rows => rows.map((row) => row.dataset.id)"))


def see(page: Page, expected: Sequence[str]) -> None:
    """Wait until the table shows these sessions in this order."""
    page.wait_for_function(
        "want => want === [...document.querySelectorAll('tbody tr[data-id]')].map((row) => row.dataset.id).join()",
        arg=",".join(expected),
    )


def test_sessions_are_found_sorted_and_renewed(page: Page, client: HTMClient) -> None:
    for name in ("agent-1", "agent-2", "tool-1"):
        client.create_session(name, dim=DIM, labels={"user": "ana" if name != "agent-2" else "ben"}, ttl_s=7_200)
    client.append("agent-1", [unit(0)] * 40)
    page.goto("/")
    see(page, ["agent-1", "tool-1", "agent-2"])
    expect(page.locator("tr[data-id=agent-1]")).to_contain_text("in 1 h")
    client.attend("tool-1", unit(0))
    see(page, ["tool-1", "agent-1", "agent-2"])
    client.create_session("new", dim=DIM)
    see(page, ["new", "tool-1", "agent-1", "agent-2"])
    page.get_by_role("button", name="Tokens").click()
    expect(page.locator("th[aria-sort=descending]")).to_have_text("Tokens")
    assert ids(page)[0] == "agent-1"
    page.get_by_role("button", name="Session", exact=True).click()
    see(page, ["agent-1", "agent-2", "new", "tool-1"])
    page.get_by_label("Id begins with").fill("agent-")
    see(page, ["agent-1", "agent-2"])
    page.get_by_label("Label").fill("user:ben")
    see(page, ["agent-2"])
    expect(page.locator("caption")).to_contain_text("1 session that match")
    page.get_by_label("Label").fill("nonsense")
    expect(page.get_by_role("alert")).to_have_text("a label is written key:value")


def test_many_sessions_are_a_page_at_a_time(page: Page, client: HTMClient) -> None:
    names = [f"s{number:03}" for number in range(205)]
    for name in names:
        client.create_session(name, dim=1)
    page.goto("/ui")
    see(page, names[:4:-1])
    page.get_by_role("button", name="Next").click()
    see(page, names[4::-1])
    expect(page.get_by_role("button", name="Next")).to_be_disabled()
    page.get_by_role("button", name="Previous").click()
    see(page, names[:4:-1])


def test_a_recall_is_shown_as_it_comes_and_says_why(page: Page, client: HTMClient) -> None:
    """A new recall was not shown 8 s later; of three notes that were asked for the page showed 16 chunk numbers, and
    the first of them opened 32 passages of which none was a hit.
    """
    fill(client, "agent")
    page.goto("/ui#/session/agent")
    expect(page.locator("#why")).to_contain_text("Choose a recall")
    expect(page.locator("#state")).to_have_text("live")
    for place, note in enumerate(NOTES):
        client.recall("agent", unit(place), n=3, top_k=6, note=f"asked for {note.split()[-1]}")
        expect(page.locator(".recalls button").first).to_contain_text(f"asked for {note.split()[-1]}", timeout=3_000)
    page.get_by_role("button", name="asked for fridge").click()
    why = page.locator("#why")
    expect(why.get_by_role("heading", name="asked for fridge")).to_be_visible()
    first = why.locator(".hit").first
    expect(first).to_contain_text("milk is in the fridge")
    expect(first).to_contain_text("room: 1")
    expect(first).to_contain_text("position 22")
    assert float(re.search(r"weight ([\d.]+) %", first.inner_text())[1]) > 30  # type: ignore[index]
    expect(why.get_by_role("heading", name="6 chunks of 15 taken")).to_be_visible()
    nearly = why.locator("h3", has_text="What nearly took part").locator("+ .hits > li")
    expect(nearly).to_have_count(5)
    expect(nearly.first).to_contain_text("less than the last one taken")
    expect(nearly.first).to_contain_text("nothing happened")
    expect(page.locator("canvas")).to_have_attribute("aria-label", re.compile("6 chunks taken by the recall shown"))
    first.get_by_role("button", name="chunk 5").click()
    row = page.locator("tr", has_text="milk is in the fridge")
    expect(page.get_by_role("heading", name="Chunk 5")).to_be_visible()
    expect(row).to_contain_text("22")
    expect(row.locator("td").nth(2)).to_contain_text("%")
    expect(row).to_be_in_viewport()
    expect(page.locator("tr.taken").first).to_be_visible()


def test_weights_that_were_replaced_are_seen(page: Page, client: HTMClient) -> None:
    """Each recall says which weights it was computed with; where others came, list, plots and strip are marked."""
    torch.manual_seed(1)
    modules = [HTMAttention(DIM, heads=2, topk_mems=3, mem_chunk_size=4, dim_head=8) for _ in range(2)]
    first, second = (client.put_model("learned", module).hash or "" for module in modules)
    client.put_model("learned", modules[0])
    fill(client, "agent", model="learned")
    client.recall("agent", unit(0), note="before")
    page.goto("/ui#/session/agent")
    why = page.locator("#why")
    expect(why).to_contain_text(f"weights {first[:8]}")
    expect(why.get_by_title(first)).to_be_visible()
    expect(page.locator("svg.plot path.mark")).to_have_count(0)
    expect(page.locator("#swaps")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("live")
    client.put_model("learned", modules[1])
    client.recall("agent", unit(1), note="after")
    newest, older = (page.locator(".recalls button").nth(place) for place in (0, 1))
    expect(newest).to_contain_text("other weights")
    expect(older).not_to_contain_text("other weights")
    words = f"model learned has the weights {second[:8]} from here on"
    expect(page.locator("svg.plot path.mark title").first).to_have_text(words)
    expect(page.locator("svg.plot path.mark")).to_have_count(2)
    expect(page.get_by_role("img", name=re.compile(f"Recalls per minute: .*; {words}"))).to_be_visible()
    expect(page.locator("#swaps")).to_be_visible()
    newest.click()
    expect(why).to_contain_text(f"weights {second[:8]}")
    expect(why).not_to_contain_text("other weights since")
    older.click()
    expect(why).to_contain_text(f"The model has other weights since, {second[:8]} instead of {first[:8]}")
    page.reload()
    expect(page.locator(".recalls button").first).to_contain_text("other weights")
    client.delete_session("agent")
    client.delete_model("learned")


def test_the_chunks_of_the_recall_are_lit_in_the_strip(page: Page, client: HTMClient) -> None:
    """Told by the colours of the canvas: those of the recall shown are there only once it is shown."""
    fill(client, "agent")
    page.goto("/ui#/session/agent")
    expect(page.locator("canvas")).to_have_attribute("aria-label", re.compile("Chunks 0 to 14 of 15"))
    assert page.evaluate(LIT) == 0
    client.attend("agent", unit(0), top_k=2)
    page.wait_for_function(f"() => ({LIT})() > 200")


def test_what_was_stored_is_text_whatever_it_says(page: Page, client: HTMClient) -> None:
    evil = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
    client.create_session("evil", dim=DIM, labels={"<b>": "<i>bold</i>"})
    client.append("evil", [unit(0)], [{"text": evil, "<u>": evil}])
    client.attend("evil", unit(0), note=evil)
    page.goto("/ui#/session/evil")
    expect(page.locator("#why .hit").first).to_contain_text(evil)
    expect(page.locator(".recalls .ask")).to_have_text(evil)
    page.goto("/ui")
    expect(page.locator(".chip")).to_have_text("<b>:<i>bold</i>")
    assert page.locator("img, main script, main b, main u, main i:not([class]):not([style])").count() == 0
    assert "evil" not in page.title()


def test_the_strip_bears_a_hundred_thousand_chunks_and_keys(page: Page, client: HTMClient) -> None:
    client.create_session("long", dim=2, chunk_size=1)
    tokens = np.random.default_rng(1).standard_normal((100_000, 2)).astype(np.float32)
    for part in np.split(tokens, 5):
        client.append("long", part)
    client.attend("long", tokens[77_777], top_k=1, note="far in")
    page.goto("/ui#/session/long")
    strip = page.locator("canvas")
    expect(strip).to_have_attribute("aria-label", re.compile("Chunks 0 to 99,999 of 100,000, 1 chunk taken"))
    strip.focus()
    for key in ("End", "+", "+", "+"):
        strip.press(key)
    expect(strip).to_have_attribute("aria-label", re.compile(r"Chunks (8\d|9\d),\d\d\d to 99,999 of 100,000"))
    strip.press("ArrowLeft")
    strip.press("Enter")
    expect(page.get_by_role("heading", name="Chunk 99,998")).to_be_focused()
    page.get_by_role("button", name="Whole").click()
    expect(strip).to_have_attribute("aria-label", re.compile("Chunks 0 to 99,999"))


def test_a_query_can_be_tried_and_does_not_count(page: Page, client: HTMClient) -> None:
    fill(client, "agent")
    page.goto("/ui#/session/agent")
    page.get_by_label("or a stored token").fill("39")
    page.get_by_label("Chunks to take").fill("2")
    page.get_by_role("button", name="Ask").click()
    answer = page.locator("form.card + .card")
    expect(answer.locator(".hit").first).to_contain_text("the meeting is on friday")
    expect(answer).to_contain_text("2 chunks of 15 taken")
    page.get_by_label("or a stored token").fill("")
    page.get_by_label(f"A vector of {DIM} numbers").fill(json.dumps(unit(0)))
    page.get_by_role("button", name="Ask").click()
    expect(answer.locator(".hit").first).to_contain_text("the key is under the mat")
    page.get_by_label(f"A vector of {DIM} numbers").fill("1, 2, three")
    page.get_by_role("button", name="Ask").click()
    expect(answer.get_by_role("alert")).to_have_text("value 3 of the vector is no number")
    page.get_by_label(f"A vector of {DIM} numbers").fill("1 2")
    page.get_by_role("button", name="Ask").click()
    expect(answer.get_by_role("alert")).to_have_text(f"the vector has 2 values, the session's tokens have {DIM}")
    assert client.session("agent").num_attends == 0 and client.recalls("agent") == []


def test_forking_and_truncating_are_asked_back(page: Page, client: HTMClient) -> None:
    client.create_session("s", dim=DIM, chunk_size=4)
    client.append("s", np.ones((10, DIM), np.float32))
    held: list[Route] = []
    page.route("**/v1/sessions/s", lambda route: held.append(route))
    page.goto("/ui#/session/s")
    expect(page.get_by_role("button", name="Truncate…")).to_be_disabled()  # until the page knows where it ends
    for route in held:
        route.continue_()
    page.unroute("**/v1/sessions/s")
    page.get_by_role("button", name="Truncate…").click()
    page.get_by_role("button", name="Cancel").click()
    assert client.session("s").length == 10
    page.get_by_role("button", name="Truncate…").click()
    page.locator("dialog").get_by_label("Length").fill("6")
    page.locator("dialog").get_by_role("button", name="Truncate").click()
    expect(page.locator("#said")).to_have_text("Truncated to 6 tokens")
    assert client.session("s").length == 6
    page.get_by_role("button", name="Fork…").click()
    page.locator("dialog").get_by_label("New session").fill("t")
    page.locator("dialog").get_by_label("Length").fill("5")
    page.locator("dialog").get_by_role("button", name="Fork").click()
    expect(page.get_by_role("heading", name="t", exact=True)).to_be_visible()
    assert (client.session("t").length, client.session("s").length) == (5, 6)


def test_deleting_is_asked_back(page: Page, client: HTMClient) -> None:
    for name, user in (("a1", "ana"), ("a2", "ana"), ("b1", "ben")):
        client.create_session(name, dim=DIM, labels={"user": user})
    page.goto("/ui#/session/b1")
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("button", name="Cancel").click()
    assert client.session("b1").id == "b1"
    page.get_by_role("button", name="Delete…").click()
    page.locator("dialog").get_by_role("button", name="Delete").click()
    see(page, ["a2", "a1"])
    page.get_by_label("Label").fill("user:ana")
    page.get_by_role("button", name="Delete all with this label…").click()
    page.get_by_label("Write the label once more").fill("user:anna")
    page.get_by_role("button", name="Delete them").click()
    expect(page.get_by_role("alert")).to_contain_text("nothing was deleted")
    page.get_by_role("button", name="Delete all with this label…").click()
    page.get_by_label("Write the label once more").fill("user:ana")
    page.get_by_role("button", name="Delete them").click()
    expect(page.locator("td.empty")).to_have_text("No session matches.")
    assert list(client.sessions()) == []


def test_a_server_that_asks_for_a_key_gets_one(troubled_page: Page, guarded: Server) -> None:
    """The key goes with every call, events too, and stays in the tab; what it may not do is not offered."""
    page = troubled_page
    with httpx.Client(base_url=guarded.url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}, trust_env=False) as admin:
        made = admin.post("/v1/keys", json={"name": "bob", "role": "read"}).raise_for_status().json()["key"]
        admin.put("/v1/sessions/a", json={"dim": DIM, "labels": {"user": "ana"}}).raise_for_status()
        admin.put("/v1/sessions/b", json={"dim": DIM}, headers={"X-HTM-Namespace": "other"}).raise_for_status()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{guarded.url}/ui")
        field = page.get_by_label("Key")
        field.fill("htm_wrong")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_text("The server does not take this key.")).to_be_visible()
        field.fill(made)
        page.get_by_role("button", name="Sign in").click()
        see(page, ["a"])
        expect(page.locator("#state")).to_have_text("live")
        assert page.evaluate("Object.values(sessionStorage)") == [made]
        assert page.evaluate("localStorage.length") == 0 and not page.context.cookies()
        assert not [url for url in asked if made in url], "a key has no place in an address"
        page.get_by_role("link", name="a", exact=True).click()
        expect(page.get_by_role("heading", name="a", exact=True)).to_be_visible()
        for name in ("Delete…", "Truncate…", "Fork…"):
            expect(page.get_by_role("button", name=name)).to_be_hidden()
        admin.delete("/v1/keys/bob").raise_for_status()
        expect(page.get_by_text("The server does not take this key.")).to_be_visible(timeout=10_000)
        of_other = {"name": "eve", "role": "read", "namespace": "other"}
        field.fill(admin.post("/v1/keys", json=of_other).raise_for_status().json()["key"])
        page.get_by_role("button", name="Sign in").click()
        where = page.get_by_role("button", name="namespace other", disabled=True)
        expect(where).to_have_css("opacity", "1")  # it was as pale as what is of no use
        page.get_by_role("button", name="Sign out").click()
        field.fill(ADMIN_KEY)
        page.get_by_role("button", name="Sign in").click()
        page.goto(f"{guarded.url}/ui#/session/a")
        expect(page.get_by_role("button", name="Delete…")).to_be_visible()
        page.get_by_role("button", name="namespace default").click()
        page.get_by_role("textbox", name="Namespace").fill("other")
        page.get_by_role("button", name="Look").click()
        see(page, ["b"])
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Key")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


METRICS = """# TYPE htm_requests_total counter
htm_requests_total{{call="attend",status="200"}} {0}.0
htm_requests_total{{call="attend",status="503"}} {1}.0
htm_request_seconds_bucket{{call="attend",le="0.001"}} {0}.0
htm_request_seconds_bucket{{call="attend",le="0.01"}} {2}.0
htm_request_seconds_bucket{{call="attend",le="+Inf"}} {2}.0
htm_batch_items_sum{{queue="device"}} {3}.0
htm_batch_items_count{{queue="device"}} {0}.0
"""


def test_figures_come_from_the_metrics(page: Page, client: HTMClient) -> None:
    looks = iter(range(1, 1_000))

    def answer(route: Route) -> None:
        look = next(looks)  # at each look: 100 requests more, of which 2 slower than a millisecond; 4 queries a batch
        text = METRICS.format(100 * look, look, 102 * look, 400 * look)
        route.fulfill(status=200, content_type="text/plain", body=text)

    page.route("**/metrics", answer)
    page.goto("/ui#/server")
    figures = page.locator("#figures")
    expect(figures).to_contain_text("requests/s")
    expect(figures.locator("div", has_text="p50").locator("dd")).to_have_text(re.compile(r"0\.5\d* ms"))
    expect(figures.locator("div", has_text="p99").locator("dd")).to_have_text(re.compile(r"[5-9](\.\d)? ms"))
    expect(figures.locator("div", has_text="batch").locator("dd")).to_have_text("4")
    latency = page.get_by_role("img", name=re.compile("^Latency: p50 .* ms, p99 .* ms now"))
    expect(latency).to_be_visible()
    expect(page.get_by_text("the fastest that this device has")).to_be_visible()


def test_after_a_restart_it_goes_on(troubled_page: Page, client: HTMClient, server: Server) -> None:
    page = troubled_page
    fill(client, "agent")
    page.goto("/ui#/session/agent")
    expect(page.locator("#state")).to_have_text("live")
    server.end(signal.SIGTERM)
    expect(page.locator("#state")).to_have_text("reconnecting")
    server.start()
    expect(page.locator("#state")).to_have_text("live", timeout=15_000)
    client.attend("agent", unit(1), note="still there?")
    expect(page.locator(".recalls button").first).to_contain_text("still there?")


PICKER = """() => {
  window.written = 0;
  window.showSaveFilePicker = async ({ suggestedName }) => ({ createWritable: async () =>
    new WritableStream({
      write(part) { window.written += part.byteLength; }, close() { window.saved = suggestedName; },
    }) });
}"""
"""What a person would be asked, answered."""


def test_a_session_is_exported(troubled_page: Page, client: HTMClient, guarded: Server, tmp_path: Path) -> None:
    """By a plain link; with a key as it comes, where the browser can write files, and by a hint where it cannot."""
    page = troubled_page
    fill(client, "s")
    page.goto("/ui#/session/s")
    with page.expect_download() as started:
        page.get_by_role("button", name="Export").click()
    assert started.value.suggested_filename == "s.safetensors"
    path = client.export("s", tmp_path / "file")
    assert Path(started.value.path()).read_bytes() == path.read_bytes()

    with HTMClient(guarded.url, api_key=ADMIN_KEY) as admin:
        fill(admin, "t")
        size = admin.export("t", tmp_path / "other").stat().st_size
        page.goto(f"{guarded.url}/ui#/session/t")
        page.get_by_label("Key").fill(ADMIN_KEY)
        page.get_by_role("button", name="Sign in").click()
        page.evaluate(PICKER)
        page.get_by_role("button", name="Export").click()
        page.wait_for_function("() => window.saved === 't.safetensors'")
        assert page.evaluate("window.written") == size
        page.evaluate("() => { delete window.showSaveFilePicker; window.showSaveFilePicker = undefined; }")
        page.get_by_role("button", name="Export").click()
        expect(page.get_by_text(f"htm-service export DIR --url {guarded.url} --prefix t")).to_be_visible()
        page.get_by_role("button", name="Close").click()
        admin.delete_session("t")
