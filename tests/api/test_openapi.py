"""openapi.json is complete, and the pages show it and the sessions with nothing from elsewhere."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize("path", ["/ui", "/docs"])
async def test_pages_are_self_contained(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|<link[^>]+stylesheet|<script[^>]+src", answer.text)
    # Payloads come from anyone, so the pages may only set text.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", answer.text)


async def test_the_page_reads_calls_that_exist(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    text = (await client.get("/ui")).text
    read = {"/v1/sessions", "/v1/info"} | {
        "/v1/sessions/{session_id}" + rest for rest in re.findall(r'of\(id, "(/\w+)/?"', text)
    }
    assert {"/v1/sessions/{session_id}/chunks", "/v1/sessions/{session_id}/recalls"} <= read
    assert read <= document["paths"].keys()
    assert (await client.get("/")).headers["location"] == "/ui"
