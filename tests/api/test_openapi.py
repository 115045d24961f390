"""openapi.json is complete, and the pages show it and the sessions with nothing from elsewhere."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.settings import Settings
from tests.api.exercised import CALLS


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings(store_url="memory://")).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, one) for path, item in document["paths"].items() for method, one in item.items()]


def test_every_route_is_documented(document: dict[str, Any]) -> None:
    """Also the plain routes, which FastAPI does not document."""
    app = create_app(Settings(store_url="memory://"))
    assert {one["operationId"] for _, _, one in operations(document)} == CALLS.keys()
    hot = {route.path for route in app.router.routes if "/v1/" in getattr(route, "path", "")}  # type: ignore[attr-defined]
    assert hot <= document["paths"].keys()


def test_operation_ids_are_unique_and_all_is_said(document: dict[str, Any]) -> None:
    ids = [one["operationId"] for _, _, one in operations(document)]
    assert len(set(ids)) == len(ids)
    for path, method, one in operations(document):
        assert one.get("description") and one.get("summary"), (path, method)
        assert one.get("tags"), (path, method)
        for name in re.findall(r"{(\w+)}", path):
            assert any(item["name"] == name and item["in"] == "path" for item in one["parameters"]), (path, method)
        for status, response in one["responses"].items():
            assert response["description"], (path, method, status)
            if int(status) >= 400:
                content = response["content"]
                assert content.keys() == {"application/problem+json"}, (path, method, status)
                problem = content["application/problem+json"]
                assert problem["schema"]["$ref"].endswith("/ProblemDocument")
                for code, example in problem["examples"].items():
                    assert example["value"]["code"] == code
                    assert example["value"]["status"] == int(status)


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    names = set(re.findall(r"'#/components/schemas/(\w+)'", repr(document)))
    assert names == document["components"]["schemas"].keys()


async def test_served(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    assert (await client.get("/openapi.json")).json() == document


FILES = sorted(file.name for file in files("api").joinpath("ui").iterdir())


@pytest.mark.parametrize("name", FILES)
async def test_pages_are_self_contained(client: httpx.AsyncClient, name: str) -> None:
    """Nothing from elsewhere, nothing inline; payloads come from anyone, so the pages may only set text."""
    answer = await client.get({"ui.html": "/ui", "docs.html": "/docs"}.get(name, f"/ui/{name}"))
    assert answer.status_code == 200
    media_type = {"html": "text/html", "css": "text/css", "js": "text/javascript"}[name.rpartition(".")[2]]
    assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-cache"
    text = answer.text.replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?://|@import|url\(", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text)
    if name.endswith(".html"):
        assert not re.search(r"<style|<script(?![^>]* src=)|\sstyle=|\son\w+=", text)
        for path in re.findall(r'(?:src|href)="(/ui/[^"]+)"', text):
            assert (await client.get(path)).status_code == 200
    for module in re.findall(r'from "\./([^"]+)"', text):
        assert module in FILES


async def test_what_is_not_a_file_of_the_page_is_not_served(client: httpx.AsyncClient) -> None:
    for path in ("/ui/ui.html", "/ui/", "/ui/..%2fauth.py", "/ui/nothing.js"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get("/")).headers["location"] == "/ui"


async def test_the_page_reads_calls_that_exist(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    text = "".join([(await client.get(f"/ui/{name}")).text for name in FILES if name.endswith(".js")])
    asked = set(re.findall(r'(?:call|send|text)\("(/[^"]+)"', text)) - {"/metrics", "/openapi.json"}
    asked |= {"/v1/sessions/{session_id}" + rest for rest in re.findall(r'of\(id, ["`](/\w+)', text)}
    assert {"/v1/events", "/v1/info", "/v1/sessions", "/v1/sessions/{session_id}/explain"} <= asked
    assert asked <= document["paths"].keys()
