"""A real server whose model files are broken, or replaced by others: it starts, says so, and keeps what it can do."""

from __future__ import annotations

import signal
from typing import Any

import httpx

from tests.engine.models import write_model
from tests.served.server import Server

NUMBERS = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_broken_and_replaced_files(server: Server) -> None:
    """A truncated file ended the start; one of another width was found out by each attend, and told of the request."""
    path = server.models / "m.safetensors"
    write_model(path, dim=3, heads=1, dim_head=2)
    server.start()

    def call(method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        answer = httpx.request(method, f"{server.url}{path}", json=body, timeout=60)
        return answer.status_code, answer.json()

    assert call("PUT", "/v1/sessions/s", {"model": "m"})[0] == 201
    assert call("POST", "/v1/sessions/s/memories", {"embeddings": NUMBERS})[0] == 200
    assert call("POST", "/v1/sessions/s/attend", {"queries": NUMBERS})[0] == 200
    assert call("GET", "/v1/models/m")[1]["error"] is None

    whole = path.read_bytes()
    write_model(path, dim=4, heads=1, dim_head=2)
    (server.models / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (server.models / "._m.safetensors").write_bytes(b"of macOS")
    server.restart(signal.SIGTERM)
    _, listed = call("GET", "/v1/models")
    assert [(model["name"], model["error"] is None) for model in listed["models"]] == [
        ("cut", False), ("m", True), ("retrieval", True)
    ]  # fmt: skip
    assert listed["models"][0]["hash"] is None and "not a safetensors file" in listed["models"][0]["error"]
    assert call("GET", "/v1/info")[1]["models"] == ["m", "retrieval"]
    assert "cut.safetensors is not served: not a safetensors file" in server.log.read_text()
    step = {"attend": {"queries": NUMBERS}, "append": {"embeddings": NUMBERS}}
    needs_it: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/attend", {"queries": NUMBERS}),
        ("POST", "/step", step),
        ("PUT", "", {"dim": 3, "model": "m"}),
        ("PATCH", "", {"model": "m"}),
    ]
    for method, place, body in needs_it:
        status, answer = call(method, f"/v1/sessions/s{place}", body)
        assert status == 422 and "has width 4" in answer["detail"], answer
    assert (
        "has width 4 now: it was replaced" in call("POST", "/v1/sessions/s/attend", {"queries": NUMBERS})[1]["detail"]
    )

    path.write_bytes(whole[:-1])
    server.restart(signal.SIGTERM)
    for method, place, body in needs_it:
        status, answer = call(method, f"/v1/sessions/s{place}", body)
        assert (status, answer["code"]) == (404, "model_not_found") and "'m' cannot be served" in answer["detail"]
    assert call("GET", "/v1/sessions/s")[1]["length"] == 2  # the steps appended nothing
    assert call("POST", "/v1/sessions/s/memories", {"embeddings": NUMBERS})[1]["length"] == 4
    assert call("POST", "/v1/sessions/s/attend", {"queries": NUMBERS, "model": "retrieval"})[0] == 200
    assert call("PATCH", "/v1/sessions/s", {"model": "retrieval"})[0] == 200
    assert call("POST", "/v1/sessions/s/step", step)[0] == 200
