"""Every documented status and code of every operation is answered by a test; none is answered undocumented."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import SecretStr, TypeAdapter

from api.app import create_app
from api.schemas import bodies, views
from api.settings import Settings
from api.wire.tensors import to_base64
from tests.api.conftest import ADMIN_KEY, Serve, fill, make_key, put_model, talk_to
from tests.api.exercised import CALLS, ON_SESSION, WITH_BODY, Call, FailingEngine, domain_error
from tests.api.test_errors import check_problem
from tests.garbage import collected
from tests.session_files import parsed, session_file

INJECTED = {
    "overloaded",
    "draining",
    "unhealthy",
    "deadline_exceeded",
    "out_of_memory",
    "disk_full",
    "quota_exceeded",
    "internal_error",
    "session_expired",
    "session_damaged",
    "idempotency_mismatch",
    "chunk_not_found",
    "length_conflict",
    "model_not_found",
}
"""Codes that are raised by an engine made for it; the others from the real one, `rate_limited` in test_access.py."""
BY_HOST = {"forbidden", "misdirected_request"}
"""Codes that a server without keys gives by the host, or the origin, that a request names."""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return create_app(Settings(store_url="memory://")).openapi()


def documented() -> list[tuple[str, int, str]]:
    """operationId, status, code; the code is empty for success."""
    found = []
    for item in create_app(Settings(store_url="memory://")).openapi()["paths"].values():
        for operation in item.values():
            for status, response in operation["responses"].items():
                content = response.get("content", {}).get("application/problem+json")
                for code in content["examples"] if content else [""]:
                    found.append((operation["operationId"], int(status), code))
    return found


DOCUMENTED = documented()


# Real failures of the real engine: what to send instead of the good request.
def at(session_id: str, *but: str) -> dict[str, dict[str, Any]]:
    """The calls on a session, on another one."""
    place = f"/v1/sessions/{session_id}"
    return {name: {"path": CALLS[name].path.replace("/v1/sessions/s", place)} for name in ON_SESSION if name not in but}


NEEDS_ARGUMENTS = {*ON_SESSION, "create_session", "list_sessions", "delete_sessions", "events", "import_session"}
"""Calls that can be wrong by more than a query parameter that there is not."""
BY_CALLER = [name for name in CALLS if name not in ("livez", "readyz")]

WRONG: dict[str, dict[str, dict[str, Any]]] = {
    "malformed_body": {
        name: {"content": b'{"dim":', "headers": {"content-type": "application/json"}} for name in WITH_BODY
    },
    "body_too_large": {
        **{name: {"content": b" " * 20_000, "headers": {"content-type": "application/json"}} for name in WITH_BODY},
        "import_session": {"content": b" " * 20_000},
        "put_model": {"content": b" " * 200_000},
    },
    "unsupported_media_type": {
        name: {"content": b"{}", "headers": {"content-type": "text/plain"}}
        for name in (*WITH_BODY, "import_session", "put_model")
    },
    "session_not_found": {
        **at("nobody", "put_session"),
        "search_all": {"json": {"queries": [1, 0, 0], "sessions": ["s", "nobody"]}},
    },
    "invalid_argument": {
        **at("a%20b"),
        "create_session": {"json": {"dim": 0}},
        "list_sessions": {"path": "/v1/sessions?limit=0"},
        "delete_sessions": {"path": "/v1/sessions"},
        "events": {"path": "/v1/events?seconds=0"},
        "import_session": {"content": session_file()[:-1]},
        **{name: {"path": CALLS[name].path + "?verbose=1"} for name in CALLS if name not in NEEDS_ARGUMENTS},
    },
    "model_not_found": {
        "inspect_model": {"path": "/v1/models/nothing"},
        "delete_model": {"path": "/v1/models/nothing"},
        "create_session": {"json": {"dim": 3, "model": "nothing"}},
        "put_session": {"json": {"dim": 3, "model": "nothing"}},
        "update_session": {"json": {"model": "nothing"}},
        "import_session": {"content": session_file(model="nothing")},
        "attend": {"json": {"queries": [1, 0, 0], "model": "nothing"}},
        "explain": {"json": {"queries": [1, 0, 0], "model": "nothing"}},
        "search": {"json": {"queries": [1, 0, 0], "model": "nothing"}},
        "search_all": {"json": {"queries": [1, 0, 0], "sessions": ["s"], "model": "nothing"}},
        "step": {"json": {"attend": {"queries": [1, 0, 0], "model": "nothing"}, "append": {"embeddings": [1, 0, 0]}}},
    },
    "unauthenticated": {name: {"headers": {"Authorization": "Bearer htm_nobodys"}} for name in BY_CALLER},
    "forbidden": {name: {"headers": {"Origin": "https://example.org"}} for name in BY_CALLER},
    "misdirected_request": {name: {"headers": {"Host": "example.org:8000"}} for name in BY_CALLER},
    "key_not_found": {"revoke_key": {"path": "/v1/keys/nobody"}},
    "key_exists": {"create_key": {"json": {"name": "bob", "role": "read"}}},
    "model_in_use": {name: {"path": "/v1/models/retrieval"} for name in ("put_model", "delete_model")},
    "model_conflict": {name: {"headers": {"If-Match": '"another"'}} for name in ("put_model", "delete_model")},
    "session_conflict": {
        "put_session": {"json": {"dim": 4}},
        "import_session": {"path": "/v1/sessions/s/import"},
        "fork": {"json": {"id": "s"}},
    },
    "length_conflict": {
        "append": {"json": {"embeddings": [1, 0, 0], "if_length": 99}},
        "step": {"json": {"attend": {"queries": [1, 0, 0]}, "append": {"embeddings": [1, 0, 0], "if_length": 99}}},
        "truncate": {"json": {"length": 1, "if_length": 99}},
    },
}


def real_failures() -> set[tuple[str, str]]:
    return {(name, code) for code, by_name in WRONG.items() for name in by_name}


def test_every_documented_failure_is_exercised() -> None:
    covered = {(name, code) for name, _, code in DOCUMENTED if code in INJECTED} | real_failures()
    missing = {(name, code) for name, _, code in DOCUMENTED if code not in ("", "rate_limited")} - covered
    assert not missing, missing


def test_every_operation_is_exercised() -> None:
    assert {name for name, _, _ in DOCUMENTED} == set(CALLS)
    successes = {(name, status) for name, status, code in DOCUMENTED if not code}
    assert successes == {(name, call.status) for name, call in CALLS.items()} | {
        ("put_session", 201),
        ("put_model", 201),
    }


@pytest.mark.parametrize("name", CALLS)
async def test_success(keyed: httpx.AsyncClient, name: str, document: dict[str, Any]) -> None:
    answer = await CALLS[name].send(keyed)
    assert answer.status_code == CALLS[name].status, answer.text
    if answer.status_code == 204:
        assert answer.content == b""
        return
    operation = next(
        operation
        for item in document["paths"].values()
        for operation in item.values()
        if operation["operationId"] == name
    )
    if answer.headers["content-type"].startswith("text/plain"):
        assert name == "metrics"
        return
    documented = operation["responses"][str(answer.status_code)]["content"]
    if answer.headers["content-type"] == "application/x-safetensors":
        assert name == "export_session" and set(documented) == {"application/x-safetensors"}
        assert parsed(answer.content)[1]["length"] == 5
        return
    if "text/event-stream" in documented:
        assert answer.headers["content-type"].startswith("text/event-stream") and answer.text.startswith(": ")
        return
    content = documented["application/json"]
    name = content["schema"]["$ref"].rsplit("/", 1)[-1]
    model = getattr(views, name, None) or getattr(bodies, name)
    TypeAdapter(model).validate_json(answer.content)
    if "example" in content:
        model.model_validate_json(httpx.Response(200, json=content["example"]).content)


async def test_put_creates(client: httpx.AsyncClient) -> None:
    answer = await client.put("/v1/sessions/new", json={"dim": 3})
    assert answer.status_code == 201
    assert answer.headers["location"] == "/v1/sessions/new"


@pytest.mark.parametrize("code", WRONG)
async def test_real_failures(serve: Serve, code: str) -> None:
    """Each of them leaves the session as it was."""
    limits = {"max_json_body_bytes": 10_000, "max_import_bytes": 10_000, "max_body_bytes": 100_000}
    async with serve(**limits, api_key=None if code in BY_HOST else ADMIN_KEY) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        await fill(client)
        if code not in BY_HOST:
            await make_key(client, "bob")
            assert (await put_model(client)).status_code == 201
        await CALLS["attend"].send(client)  # so that it is on the device before and after
        before = (await client.get("/v1/sessions/s")).json()
        for name, changes in WRONG[code].items():
            status = next((status for op, status, one in DOCUMENTED if (op, one) == (name, code)), None)
            assert status is not None, f"{name} does not document {code}"
            async with collected() as found:
                check_problem(await CALLS[name].send(client, **changes), status, code)
            assert not found, name
        after = (await client.get("/v1/sessions/s")).json()
        changing = ("last_used_at", "num_attends", "num_queries")  # a step attends before its append is refused
        assert {key: value for key, value in after.items() if key not in changing} == {
            key: value for key, value in before.items() if key not in changing
        }
        assert len((await client.get("/v1/sessions")).json()["sessions"]) == 1


@pytest.mark.parametrize("code", sorted(INJECTED))
async def test_injected_failures(code: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    engine: Any = FailingEngine(domain_error(code))
    settings = Settings(store_url="memory://", api_key=SecretStr(ADMIN_KEY))
    async with talk_to(create_app(settings, engine=engine)) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        for name, status, documented_code in DOCUMENTED:
            if documented_code != code:
                continue
            # Metrics are told however the engine is, but not to a key that may have been taken back.
            stale = {"headers": {"Authorization": "Bearer htm_of_the_store"}} if name == "metrics" else {}
            answer = await CALLS[name].send(client, **(stale if code == "unhealthy" else {}))
            problem = check_problem(answer, status, code)
            assert ("retry-after" in answer.headers) is (status in (503, 507)), name
            assert "secret" not in problem["detail"]


async def test_beyond_the_budget_with_nothing_to_offload(serve: Serve) -> None:
    """Its keys alone need more than there is; the others go on, and the bytes are told tier by tier."""
    rows = np.ones((150, 1_024), np.float32)
    async with serve(memory_budget_bytes=1 << 20) as client:
        for name, chunk_size in (("large", 1), ("small", 10)):
            await client.put(f"/v1/sessions/{name}", json={"dim": 1_024, "chunk_size": chunk_size})
            for _ in range(2 if name == "large" else 1):
                body = {"embeddings": to_base64(rows)}
                assert (await client.post(f"/v1/sessions/{name}/memories", json=body)).status_code == 200
        query = {"queries": [[1.0] * 1_024], "top_k": 1}
        refused = await client.post("/v1/sessions/large/attend", json=query)
        problem = check_problem(refused, 507, "out_of_memory")
        assert int(refused.headers["retry-after"]) > 0 and "of 1048576 bytes are in use" in problem["detail"]
        assert (await client.post("/v1/sessions/small/attend", json=query)).status_code == 200
        large, small = [(await client.get(f"/v1/sessions/{name}")).json()["bytes"] for name in ("large", "small")]
        assert large == {"device": 0, "device_keys": 0, "stored": 2 * rows.nbytes}
        assert small["stored"] == rows.nbytes and 15 * 4_096 <= small["device_keys"] < small["device"]
        totals = (await client.get("/v1/info")).json()["totals"]
        assert totals["stored_bytes"] == large["stored"] + small["stored"]
        assert totals["device_key_bytes"] == small["device_keys"] < totals["device_bytes"] <= 1 << 20


async def test_an_expired_session_is_gone(serve: Serve) -> None:
    now = 1_000_000.0
    async with serve(clock=lambda: now) as client:
        await fill(client)
        await client.patch("/v1/sessions/s", json={"ttl_s": 60})
        now += 61
        check_problem(await client.get("/v1/sessions/s"), 410, "session_expired")


async def test_a_key_with_another_body(client: httpx.AsyncClient) -> None:
    call = Call("POST", "/v1/sessions/s/memories", 200, {"embeddings": [1, 0, 0]}, {"Idempotency-Key": "k"})
    first = await call.send(client)
    assert (await call.send(client)).json() == first.json()
    check_problem(await call.send(client, json={"embeddings": [0, 1, 0]}), 422, "idempotency_mismatch")
    check_problem(await client.get("/v1/sessions/s/chunks/99"), 404, "chunk_not_found")
    assert (await client.get("/v1/sessions/s")).json()["length"] == 6


async def test_a_failure_is_logged_with_its_request_id(caplog: pytest.LogCaptureFixture) -> None:
    engine: Any = FailingEngine(RuntimeError("a secret"))
    async with talk_to(create_app(Settings(store_url="memory://"), engine=engine)) as client:
        answer = await client.get("/v1/info", headers={"X-Request-Id": "find-me"})
    assert "secret" not in answer.text
    assert "find-me" in caplog.text
    assert "a secret" in caplog.text
