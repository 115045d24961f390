"""R15: every call by everyone who may ask, and nothing of another namespace anywhere."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.auth import MAX_REMEMBERED_BYTES, OPEN, ROLES
from api.settings import Settings
from tests.api.conftest import ADMIN_KEY, Serve, fill, make_key, put_model
from tests.api.exercised import CALLS, ON_SESSION
from tests.api.test_errors import check_problem

NEEDS: Mapping[str, str] = {
    "livez": "nothing",
    "readyz": "nothing",
    "info": "read",
    "metrics": "admin of all",
    "list_models": "read",
    "inspect_model": "read",
    "put_model": "admin",
    "delete_model": "admin",
    "list_sessions": "read",
    "create_session": "write",
    "put_session": "write",
    "inspect_session": "read",
    "update_session": "write",
    "delete_session": "write",
    "fork": "write",
    "truncate": "write",
    "append": "write",
    "read_memories": "read",
    "attend": "read",
    "step": "write",
    "list_chunks": "read",
    "inspect_chunk": "read",
    "list_recalls": "read",
    "session_heat": "read",
    "explain": "read",
    "select": "read",
    "search": "read",
    "search_all": "read",
    "events": "read",
    "delete_sessions": "write",
    "export_session": "read",
    "import_session": "write",
    "list_keys": "admin",
    "create_key": "admin",
    "revoke_key": "admin",
    "get_quota": "admin",
    "put_quota": "admin of all",
    "batch_append": "write",
    "batch_attend": "read",
    "batch_step": "write",
    "batch_search": "read",
    "batch_select": "read",
    "batch_truncate": "write",
}
"""What each call needs, said here once more: who adds a call has to say it twice."""
CALLERS = ("no key", "wrong", "malformed", "revoked", "expired", "read", "write", "admin", "other namespace", "all")
RANKS = ("read", "write", "admin")
MARK = "zebra"
"""Part of every name and text that is the other namespace's."""


class Clock:
    """Time that goes on when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client(serve: Serve, clock: Clock) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server with keys: the session `s` of namespace `default`, and one of another that is full of its mark."""
    async with serve(api_key=ADMIN_KEY, clock=clock, recalls_per_session=16) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        await fill(client)
        await make_key(client, "bob")
        assert (await put_model(client)).status_code == 201
        yield client


def admin(namespace: str | None = None) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    return headers if namespace is None else {**headers, "X-HTM-Namespace": namespace}


async def authorization(client: httpx.AsyncClient, clock: Clock, caller: str) -> dict[str, str]:
    """The headers of a kind of caller, whose key is made for it."""
    if caller in ("no key", "wrong", "malformed", "all"):
        found = {"wrong": "Bearer htm_wrong", "malformed": f"Basic {ADMIN_KEY}", "all": f"Bearer {ADMIN_KEY}"}
        return {"Authorization": found.get(caller, "")}
    role = caller if caller in RANKS else "admin"
    wish: dict[str, Any] = {"namespace": MARK} if caller == "other namespace" else {}
    if caller == "expired":
        wish["expires_in_s"] = 60
    secret = await make_key(client, f"the-{caller.partition(' ')[0]}", role, **wish)
    if caller == "revoked":
        assert (await client.delete("/v1/keys/the-revoked")).status_code == 204
    if caller == "expired":
        assert (await client.get("/v1/info", headers={"Authorization": f"Bearer {secret}"})).status_code == 200
        clock.now += 60
    return {"Authorization": f"Bearer {secret}"}


def expected(name: str, caller: str) -> tuple[int, str]:
    """Status and code; no code for success."""
    call, needs = CALLS[name], NEEDS[name]
    if needs == "nothing" or caller == "all":
        return call.status, ""
    if caller in ("no key", "wrong", "malformed", "revoked", "expired"):
        return 401, "unauthenticated"
    if needs == "admin of all" or (caller in RANKS and RANKS.index(caller) < RANKS.index(needs)):
        return 403, "forbidden"
    if caller == "other namespace":
        if name == "get_quota":
            return 403, "forbidden"
        if name in ("put_session", "put_model"):
            return 201, ""  # the name is free there
        if name == "delete_model":
            return 404, "model_not_found"
        if name in ON_SESSION or name == "search_all":
            return 404, "session_not_found"
        if name == "revoke_key":
            return 404, "key_not_found"
    return call.status, ""


def test_no_call_is_missing_from_the_matrix() -> None:
    paths = create_app(Settings(store_url="memory://")).openapi()["paths"]
    documented = {one["operationId"]: (path, one) for path, item in paths.items() for one in item.values()}
    assert documented.keys() == NEEDS.keys() == ROLES.keys() == CALLS.keys()
    for name, (path, operation) in documented.items():
        assert (path in OPEN) == (NEEDS[name] == "nothing") == ("security" not in operation)
        assert operation.get("x-role", "nothing") == NEEDS[name].partition(" ")[0]


@pytest.mark.parametrize("caller", CALLERS)
async def test_the_matrix(client: httpx.AsyncClient, clock: Clock, caller: str) -> None:
    """Each call is answered as documented, and a call that is refused has done nothing."""
    headers = await authorization(client, clock, caller)
    for name, call in CALLS.items():
        status, code = expected(name, caller)
        before = await state(client)
        answer = await call.send(client, headers=headers)
        if code:
            check_problem(answer, status, code)
            assert await state(client) == before, f"{name} by {caller} was refused and changed something"
        assert answer.status_code == status, f"{name} by {caller}: {answer.text}"
        assert ("www-authenticate" in answer.headers) is (status == 401)
        if name == "delete_session" and status == 204:
            await fill(client)
        if name == "revoke_key" and status == 204:
            await make_key(client, "bob")
        if name == "delete_model" and status == 204:
            await put_model(client)
        if caller == "other namespace" and name in ("put_session", "put_model"):
            assert (await client.delete(call.path, headers=headers)).status_code == 204


async def state(client: httpx.AsyncClient) -> str:
    """What an admin sees of sessions and keys, but for what only says that someone was there."""
    seen = [(await client.get(path, headers=admin())).json() for path in ("/v1/sessions", "/v1/keys", "/v1/models")]
    seen.append((await client.get("/v1/sessions", headers=admin(MARK))).json())
    for items in (seen[0]["sessions"], seen[1]["keys"], seen[3]["sessions"]):
        for item in items:
            for name in ("last_used_at", "num_attends", "num_queries"):
                item.pop(name, None)
    return json.dumps(seen)


@pytest.mark.parametrize("caller", ["no key", "wrong", "read", "other namespace"])
async def test_paths_that_are_none_ask_for_a_key_too(client: httpx.AsyncClient, clock: Clock, caller: str) -> None:
    headers = await authorization(client, clock, caller)
    is_known = caller in ("read", "other namespace")
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, "not_found"),
        ("PUT", "/v1/info", 405, "method_not_allowed"),
    ):
        answer = await client.request(method, path, headers=headers)
        check_problem(answer, *((status, code) if is_known else (401, "unauthenticated")))
    for path in ("/ui", "/docs", "/openapi.json", "/"):
        assert (await client.get(path, headers=headers)).status_code in (200, 307)


async def test_nothing_of_another_namespace_is_told(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """In no body, header, error, count, cursor or listing, whatever it does to the ids that the others have."""
    caplog.set_level(logging.DEBUG)
    theirs = {"Authorization": f"Bearer {await make_key(client, f'key-{MARK}', 'admin', namespace=MARK)}"}
    for id_ in ("s", f"{MARK}-1", f"{MARK}-2"):
        settings = {"dim": 5, "labels": {"of": MARK}}
        assert (await client.put(f"/v1/sessions/{id_}", json=settings, headers=theirs)).status_code == 201
        body = {"embeddings": [[1, 2, 3, 4, 5]] * 7, "payloads": [{"text": MARK}] * 7}
        sent = {**theirs, "Idempotency-Key": "k"}
        assert (await client.post(f"/v1/sessions/{id_}/memories", json=body, headers=sent)).status_code == 200
        attend = {"queries": [[1, 2, 3, 4, 5]], "return": ["payloads"]}
        assert (await client.post(f"/v1/sessions/{id_}/attend", json=attend, headers=theirs)).status_code == 200
    mine = {"Authorization": f"Bearer {await make_key(client, 'mine', 'admin')}"}
    told: list[httpx.Response] = []
    for name, call in CALLS.items():
        told.append(await call.send(client, headers=mine))
        if name in ON_SESSION:
            other = call.path.replace("/v1/sessions/s", f"/v1/sessions/{MARK}-1")
            told.append(await call.send(client, path=other, headers=mine))
            assert told[-1].status_code in (201, 404)
            if told[-1].status_code == 201:
                await client.delete(other, headers=mine)
        if name == "delete_session":
            await fill(client)
    repeated = await client.post(
        "/v1/sessions/s/memories", json={"embeddings": [1, 0, 0]}, headers={**mine, "Idempotency-Key": "k"}
    )
    assert repeated.status_code == 200, "an Idempotency-Key is its session's, whatever the other namespace used it for"
    told.append(await client.get("/v1/sessions?limit=1", headers=mine))
    told.append(await client.get(f"/v1/sessions?label=of:{MARK}", headers=mine))
    assert told[-1].json() == {"sessions": [], "cursor": None}
    for answer in told:
        request = f"{answer.request.method} {answer.request.url}"
        own = f"{answer.headers} {answer.text}".replace(f"{MARK}-1", "")  # it names the id that it was asked for
        assert MARK not in own, f"{request}: {own}"
    info = (await client.get("/v1/info", headers=mine)).json()["totals"]
    held = (await client.get("/v1/sessions", headers=mine)).json()["sessions"]
    length = sum(one["length"] for one in held)
    assert info == {"sessions": len(held), "tokens": length, "stored_bytes": 12 * length}
    assert (await client.get("/v1/info", headers=admin())).json()["totals"]["sessions"] == len(held) + 3
    assert MARK not in (await client.get("/metrics", headers=admin())).text
    assert (await client.get("/v1/sessions/s", headers=theirs)).json()["length"] == 7
    assert ADMIN_KEY not in caplog.text and "htm_" not in caplog.text


async def test_events_are_those_of_the_own_namespace(client: httpx.AsyncClient) -> None:
    theirs = {"Authorization": f"Bearer {await make_key(client, f'key-{MARK}', 'admin', namespace=MARK)}"}
    mine = {"Authorization": f"Bearer {await make_key(client, 'mine', 'read')}"}

    async def work() -> None:
        await asyncio.sleep(0.1)
        for headers in (theirs, admin()):
            await client.put("/v1/sessions/both", json={"dim": 3}, headers=headers)
            await client.post("/v1/sessions/both/memories", json={"embeddings": [1, 0, 0]}, headers=headers)
            await client.post("/v1/sessions/both/attend", json={"queries": [1, 0, 0], "note": MARK}, headers=theirs)

    told, _ = await asyncio.gather(client.get("/v1/events?seconds=1", headers=mine), work())
    assert MARK not in told.text
    assert [line for line in told.text.splitlines() if line.startswith("event")] == ["event: session", "event: append"]


@pytest.mark.parametrize("end", ["revoked", "expired"])
async def test_a_stream_of_events_ends_with_its_key(client: httpx.AsyncClient, clock: Clock, end: str) -> None:
    """It told all that happened for as long as its reader liked, whatever became of the key."""
    mine = {"Authorization": f"Bearer {await make_key(client, 'mine', 'read', expires_in_s=60)}"}

    async def work() -> float:
        await asyncio.sleep(0.3)
        if end == "revoked":
            await client.delete("/v1/keys/mine")
        else:
            clock.now += 60
        await client.put("/v1/sessions/later", json={"dim": 3})
        return time.monotonic()

    told, ended_at = await asyncio.gather(client.get("/v1/events?seconds=9", headers=mine), work())
    assert time.monotonic() - ended_at < 2
    assert told.status_code == 200 and "later" not in told.text


@pytest.mark.parametrize("name", ["append", "update_session", "import_session", "put_model"])
async def test_a_body_that_comes_slowly_ends_with_its_key(client: httpx.AsyncClient, name: str) -> None:
    """Whoever had begun to send could go on for hours, and write with a key that was taken back."""
    mine = {"Authorization": f"Bearer {await make_key(client, 'mine', 'admin')}"}
    before = await state(client)
    exported = (await client.get("/v1/sessions/s/export")).content
    kinds = {
        "append": ("POST", "/v1/sessions/s/memories", b'{"embeddings": [1, 0, 0]}', "json"),
        "update_session": ("PATCH", "/v1/sessions/s", b'{"labels": {"a": "b"}}', "json"),
        "import_session": ("PUT", "/v1/sessions/new/import", exported, "x-safetensors"),
        "put_model": ("PUT", "/v1/models/new", exported, "x-safetensors"),
    }
    method, path, whole, kind = kinds[name]

    async def slowly() -> AsyncIterator[bytes]:
        yield whole[:10]
        await client.delete("/v1/keys/mine")
        await asyncio.sleep(0.6)
        yield whole[10:]

    headers = {**mine, "Content-Type": f"application/{kind}"}
    check_problem(await client.request(method, path, content=slowly(), headers=headers), 401, "unauthenticated")
    await make_key(client, "mine", "admin")
    assert await state(client) == before


async def test_an_admin_of_all_names_the_namespace(client: httpx.AsyncClient) -> None:
    assert (await client.put("/v1/sessions/s", json={"dim": 4}, headers=admin("blue"))).status_code == 201
    assert (await client.get("/v1/sessions/s", headers=admin("blue"))).json()["dim"] == 4
    assert (await client.get("/v1/sessions/s", headers=admin())).json()["dim"] == 3
    assert (await client.get("/v1/info", headers=admin("blue"))).json()["totals"]["sessions"] == 1
    for wrong in ("*", "a b", "a/b", "x" * 129, ""):
        for path in ("/v1/sessions/s", "/v1/sessions", "/v1/info"):
            check_problem(await client.get(path, headers=admin(wrong)), 422, "invalid_argument")
    mine = await make_key(client, "mine", "admin")
    for name, status in (("default", 200), ("blue", 403), ("*", 403)):
        headers = {"Authorization": f"Bearer {mine}"}
        seen = await client.get("/v1/sessions/s", headers={**headers, "X-HTM-Namespace": name})
        assert seen.status_code == status
        wish = {"name": name.replace("*", "all"), "role": "admin", "namespace": name}
        made = await client.post("/v1/keys", json=wish, headers=headers)
        assert made.status_code == (201 if status == 200 else 403)


async def test_a_key_is_told_once_and_its_use_is_noted(client: httpx.AsyncClient, clock: Clock) -> None:
    made = (await client.post("/v1/keys", json={"name": "k", "role": "write", "expires_in_s": 90})).json()
    assert made["key"].startswith("htm_") and len(made["key"]) == 47
    keys = {key["name"]: key for key in (await client.get("/v1/keys")).json()["keys"]}
    assert made.pop("key") not in str(keys) and keys["k"] == made and made["last_used_at"] is None
    assert made["expires_at"] == "1970-01-12T13:48:10Z"
    other = await make_key(client, "other", "admin")
    await client.get("/v1/info", headers={"Authorization": f"Bearer {other}"})
    keys = {key["name"]: key for key in (await client.get("/v1/keys")).json()["keys"]}
    assert keys["other"]["last_used_at"] == "1970-01-12T13:46:40Z"
    check_problem(await client.post("/v1/keys", json={"name": "k", "role": "read"}), 409, "key_exists")
    wrongs: list[dict[str, Any]] = [
        {"name": "a b"},
        {"role": "root"},
        {"expires_in_s": 0},
        {"requests_per_second": -1},
        {"namespace": "a/b"},
    ]
    for wrong in wrongs:
        refused = await client.post("/v1/keys", json={"name": "n", "role": "read", **wrong})
        check_problem(refused, 422, "invalid_argument")


async def test_only_keys_that_count_are_remembered(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is hashed once for all its requests; whoever guesses leaves nothing behind."""
    name = "remembered"
    secret = await make_key(client, name, "read")
    hashed: list[bytes] = []
    sha256 = hashlib.sha256

    def noted(data: bytes) -> Any:
        hashed.append(data)
        return sha256(data)

    monkeypatch.setattr(hashlib, "sha256", noted)
    for key, num_hashed, status in ((secret, 1, 200), ("wrong", 3, 401)):
        for _ in range(3):
            answer = await client.get("/v1/sessions", headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status
        assert hashed.count(key.encode()) == num_hashed
    padded = {"Authorization": f"Bearer {secret}" + " " * MAX_REMEMBERED_BYTES}
    assert [(await client.get("/v1/sessions", headers=padded)).status_code for _ in range(2)] == [200, 200]
    assert (await client.delete(f"/v1/keys/{name}")).status_code == 204
    answer = await client.get("/v1/sessions", headers={"Authorization": f"Bearer {secret}"})
    assert answer.status_code == 401


async def test_a_key_has_its_own_rate(client: httpx.AsyncClient) -> None:
    slow = {
        "Authorization": f"Bearer {await make_key(client, 'slow', 'admin', namespace='*', requests_per_second=0.01)}"
    }
    assert (await client.get("/v1/info", headers=slow)).status_code == 200
    for name, call in CALLS.items():
        answer = await call.send(client, headers=slow)
        if NEEDS[name] == "nothing":
            assert answer.status_code == 200
            continue
        check_problem(answer, 429, "rate_limited")
        assert 90 <= int(answer.headers["retry-after"]) <= 100
    assert (await client.get("/v1/info")).status_code == 200, "nobody else's"


async def test_a_namespace_holds_no_more_than_its_quota(client: httpx.AsyncClient) -> None:
    limits = {"max_sessions": 2, "max_tokens": 10, "max_bytes": 1_000}
    assert (await client.put("/v1/quotas/blue", json=limits)).json() == {
        "namespace": "blue", **limits, "num_sessions": 0, "num_tokens": 0, "num_bytes": 0,
    }  # fmt: skip
    theirs = {"Authorization": f"Bearer {await make_key(client, 'blue', 'admin', namespace='blue')}"}
    for id_, status in (("a", 201), ("b", 201), ("c", 507), ("a", 200)):
        made = await client.put(f"/v1/sessions/{id_}", json={"dim": 3}, headers=theirs)
        assert made.status_code == status
    appends = (
        client.post(f"/v1/sessions/{'ab'[number % 2]}/memories", json={"embeddings": [1, 0, 0]}, headers=theirs)
        for number in range(17)
    )
    answers = await asyncio.gather(*appends)
    assert sum(answer.status_code == 200 for answer in answers) == 10, "however many come at once"
    refused = next(answer for answer in answers if answer.status_code != 200)
    problem = check_problem(refused, 507, "quota_exceeded")
    assert problem["detail"] == "the namespace would hold 11 tokens, its quota is 10" and refused.headers["retry-after"]
    assert (await client.get("/v1/quotas/blue", headers=theirs)).json()["num_tokens"] == 10
    check_problem(await client.put("/v1/quotas/blue", json={}, headers=theirs), 403, "forbidden")
    await client.delete("/v1/sessions/a", headers=theirs)
    await client.put("/v1/sessions/c", json={"dim": 3}, headers=theirs)
    body = {"embeddings": [[1, 0, 0]] * 5}
    assert (await client.post("/v1/sessions/c/memories", json=body, headers=theirs)).status_code == 200
    assert (await client.post("/v1/sessions/s/memories", json=body)).status_code == 200, "of another namespace"
    for wrong in ({"max_tokens": -1}, {"max_bytes": 1.5}, {"max_sessoins": 3}):
        check_problem(await client.put("/v1/quotas/blue", json=wrong), 422, "invalid_argument")


async def test_metrics_may_be_open(serve: Serve) -> None:
    async with serve(api_key=ADMIN_KEY, metrics_open=True) as client:
        assert (await client.get("/metrics")).status_code == 200
        check_problem(await client.get("/v1/info"), 401, "unauthenticated")


async def test_a_server_without_keys_makes_none(serve: Serve) -> None:
    """The first would shut out whoever made it, if it is no admin's."""
    async with serve() as client:
        await fill(client)
        check_problem(await client.post("/v1/keys", json={"name": "k", "role": "read"}), 403, "forbidden")
        assert (await client.get("/v1/keys")).json() == {"keys": []}


async def test_keys_of_the_store_count_without_an_admins(serve: Serve, tmp_path: Any) -> None:
    """A server that is started again without the admin's key must not answer everyone."""
    url = f"sqlite:///{tmp_path}/htm.sqlite3"
    async with serve(api_key=ADMIN_KEY, store_url=url) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        secret = await make_key(client, "k")
        assert (await client.get("/v1/info", headers={"Authorization": f"Bearer {secret}"})).status_code == 200
    for insecure in (False, True):
        async with serve(store_url=url, insecure=insecure) as client:
            check_problem(await client.get("/v1/sessions"), 401, "unauthenticated")
            check_problem(await client.get("/v1/sessions", headers=admin()), 401, "unauthenticated")
            assert (await client.get("/v1/sessions", headers={"Authorization": f"Bearer {secret}"})).status_code == 200
    assert secret.encode() not in (tmp_path / "htm.sqlite3").read_bytes()


async def test_pages_of_elsewhere_are_let_in_by_name(serve: Serve) -> None:
    """The browser asks first, without a key; then the page calls with one. Nobody is let in without."""
    async with serve(api_key=ADMIN_KEY, cors_origins="https://app.example.org, http://localhost:5173") as client:
        for origin, is_known in (("https://app.example.org", True), ("http://localhost:5173", True), ("null", False)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "PUT"}
            asked["Access-Control-Request-Headers"] = "authorization,x-htm-namespace"
            preflight = await client.options("/v1/sessions/s", headers=asked)
            assert (preflight.status_code == 200) is is_known
            answer = await client.get("/v1/info", headers={**admin(), "Origin": origin})
            assert (answer.headers.get("access-control-allow-origin") == origin) is is_known
            assert "access-control-allow-credentials" not in answer.headers
            check_problem(await client.get("/v1/info", headers={"Origin": origin}), 401, "unauthenticated")
    async with serve(api_key=ADMIN_KEY) as client:
        answer = await client.get("/v1/info", headers={**admin(), "Origin": "https://app.example.org"})
        assert not any(name.startswith("access-control") for name in answer.headers)
