"""What HTTP itself says of methods, formats, queries and hosts, and how large a body or an answer may be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from io import StringIO
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from api.app import create_app
from api.logs import LINE, Lines
from api.settings import Settings
from api.wire import safetensors
from api.wire.answers import accepted
from tests.api.conftest import Serve, fill, talk_to
from tests.api.exercised import CALLS, FailingEngine
from tests.api.test_errors import check_problem

DEEP = b"[" * 1_000 + b"]" * 1_000
JSON = {"content-type": "application/json"}


# --- methods and paths ---


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v1/info", "/v1/sessions/s", "/v1/sessions/s/memories", "/ui"])
async def test_head_is_get_without_the_body(client: httpx.AsyncClient, path: str) -> None:
    """`wget --spider` could not ask whether the server lives."""
    head, get = await client.head(path), await client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    check_problem(await client.get("/v1/sessions/nobody"), 404, "session_not_found")
    assert (await client.head("/v1/sessions/nobody")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/sessions/s/attend/", "/v1/sessions/", "/livez/"])
async def test_a_slash_too_many_is_no_redirect(client: httpx.AsyncClient, path: str) -> None:
    """It led to wherever the `Host` header said."""
    check_problem(await client.post(path), 404, "not_found")


# --- queries ---


@pytest.mark.parametrize("name", CALLS)
async def test_unknown_query_parameters_are_refused(keyed: httpx.AsyncClient, name: str) -> None:
    path = CALLS[name].path
    path += "&" if "?" in path else "?"
    problem = check_problem(await CALLS[name].send(keyed, path=f"{path}lable=a:b"), 422, "invalid_argument")
    assert "unknown query parameter 'lable'; known are" in problem["detail"]


@pytest.mark.parametrize(
    "path", ["/v1/sessions/s/memories?include=payloads&include=embeddings", "/v1/sessions?limit=1&limit=2"]
)
async def test_a_parameter_that_is_there_twice_is_refused(client: httpx.AsyncClient, path: str) -> None:
    """The last one won."""
    check_problem(await client.get(path), 422, "invalid_argument")


async def test_labels_may_be_repeated(client: httpx.AsyncClient) -> None:
    await client.patch("/v1/sessions/s", json={"labels": {"a": "1", "b": "2"}})
    found = await client.get("/v1/sessions?label=a:1&label=b:2")
    assert [session["id"] for session in found.json()["sessions"]] == ["s"]


# --- formats ---


@pytest.mark.parametrize(
    ("header", "default", "expected"),
    [
        ("*/*", "json", "json"),
        ("*/*", "safetensors", "safetensors"),
        ("application/x-safetensors;q=0, application/json", "safetensors", "json"),
        ("APPLICATION/X-SAFETENSORS", "json", "safetensors"),
        ("application/json;q=0.2, application/x-safetensors; q=0.9", "json", "safetensors"),
        ("application/x-safetensors;q=0.5, */*", "safetensors", "json"),
        ("application/*;q=0.1, application/json", "safetensors", "json"),
        ("text/html", "safetensors", "safetensors"),
        ("application/json;q=none", "safetensors", "safetensors"),
        ("", "json", "json"),
    ],
)
def test_accept(header: str, default: Any, expected: str) -> None:
    assert accepted(header, default) == expected


async def test_an_answer_is_what_accept_prefers(client: httpx.AsyncClient) -> None:
    headers = {"Accept": "application/x-safetensors;q=0, application/json"}
    answer = await client.post("/v1/sessions/s/attend", json={"queries": [1, 0, 0]}, headers=headers)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["open_chunk", "on_full", "labels", "ttl_s", "model", "dtype", "chunk_size"])
async def test_a_null_setting_counts_as_absent(client: httpx.AsyncClient, name: str) -> None:
    made = await client.put("/v1/sessions/new", json={"dim": 3, name: None})
    assert made.status_code == 201
    assert made.json()["open_chunk"] == "attend" and made.json()["on_full"] == "reject"


async def test_a_null_change_leaves_things_as_they_are(client: httpx.AsyncClient) -> None:
    await client.patch("/v1/sessions/s", json={"labels": {"a": "1"}, "ttl_s": 60})
    changed = (await client.patch("/v1/sessions/s", json={"labels": None, "model": None})).json()
    assert (changed["labels"], changed["model"], changed["ttl_s"]) == ({"a": "1"}, "retrieval", 60)
    assert (await client.patch("/v1/sessions/s", json={"ttl_s": None})).json()["ttl_s"] is None


# --- who may call ---


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:9000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST", "127.1.2.3"]
)
async def test_names_of_this_machine(client: httpx.AsyncClient, host: str) -> None:
    answer = await client.get("/v1/info", headers={"Host": host, "Origin": f"http://{host}"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "host", ["example.org", "localhost.example.org", "10.0.0.1", "127.0.0.1.example.org:8000", "0.0.0.0"]
)
async def test_a_page_of_elsewhere_reaches_nothing(client: httpx.AsyncClient, host: str) -> None:
    """A name on the web that resolves to 127.0.0.1 let its page read every session through a browser."""
    check_problem(await client.get("/v1/sessions/s", headers={"Host": host}), 421, "misdirected_request")
    own = {"Host": "localhost", "Origin": f"https://{host}"}
    check_problem(await client.delete("/v1/sessions/s", headers=own), 403, "forbidden")
    check_problem(await client.post("/v1/sessions/s/attend", headers={"Origin": "null"}), 403, "forbidden")
    assert (await client.get("/livez", headers={"Host": host})).status_code == 200
    assert (await client.get("/v1/sessions/s")).json()["length"] == 5


async def test_a_server_for_others_asks_nobody(serve: Serve) -> None:
    async with serve(insecure=True) as client:
        assert (await client.get("/v1/info", headers={"Host": "htm.example.org"})).status_code == 200


# --- what is too large ---


async def test_settings_are_small(client: httpx.AsyncClient) -> None:
    """3.5 MB of unknown fields held up everybody for 2 s, and were answered one by one."""
    many = orjson.dumps({"dim": 2, **{f"k{number}": 1 for number in range(300_000)}})
    problem = check_problem(await client.put("/v1/sessions/new", content=many, headers=JSON), 413, "body_too_large")
    assert "the limit is 262144" in problem["detail"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dim": 2, **{f"k{number}": 1 for number in range(18_000)}}, "unknown field k0; known are chunk_size, dim"),
        (
            {"dim": 2, "labels": {f"k{number}": 1 for number in range(18_000)}},
            "there are 18000 labels",
        ),
        ({"dim": 2, "labels": [{}] * 50_000}, "labels: Input should be a valid dictionary"),
        ({"k" * 200_000: 1}, "unknown field kkk"),
        ({"dim": 2, "labels": {"k" * 200_000: 1}}, "labels.kkk"),
    ],
)
async def test_only_the_first_mistake_is_told(client: httpx.AsyncClient, settings: Any, expected: str) -> None:
    problem = check_problem(await client.put("/v1/sessions/new", json=settings), 422, "invalid_argument")
    assert expected in problem["detail"] and len(problem["detail"]) < 500


LIMIT = 20_000


@pytest.fixture
async def limited(serve: Serve) -> Any:
    """A client of a server with small answers, and a session `s` of five tokens with payloads of 4 kB."""
    async with serve(max_answer_bytes=LIMIT, max_json_body_bytes=LIMIT) as client:
        await client.put("/v1/sessions/s", json={"dim": 3, "chunk_size": 5, "labels": {"k": "v" * 256}})
        for number in range(5):
            body = {"embeddings": [1, 0, number], "payloads": [{"text": f"{number}" * 4_000}]}
            assert (await client.post("/v1/sessions/s/memories", json=body)).status_code == 200
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/sessions/s/memories", None),
        ("GET", "/v1/sessions/s/chunks/0", None),
        ("POST", "/v1/sessions/s/attend", {"queries": [[1, 0, 0]] * 2, "return": ["payloads"]}),
        ("POST", "/v1/sessions/s/attend", {"queries": [[1, 0, 0]] * 100, "return": ["tokens"]}),
        ("POST", "/v1/sessions/s/attend", {"queries": [[1, 0, 0]] * 1_700}),
        (
            "POST",
            "/v1/sessions/s/step",
            {"attend": {"queries": [[1, 0, 0]] * 2, "return": ["payloads"]}, "append": {"embeddings": [1, 0, 0]}},
        ),
    ],
)
async def test_an_answer_that_would_be_too_large_is_refused(
    limited: httpx.AsyncClient, method: str, path: str, body: Any
) -> None:
    """A request of a few bytes had answers of any size: 40 queries, each with five payloads of 3.8 MB, 724 MB."""
    problem = check_problem(await limited.request(method, path, json=body), 422, "invalid_argument")
    assert str(LIMIT) in problem["detail"]
    assert (await limited.get("/v1/sessions/s")).json()["length"] == 5, "nothing half done"


async def test_what_fits_is_answered(limited: httpx.AsyncClient) -> None:
    assert len((await limited.get("/v1/sessions/s/memories?start=1&stop=5")).json()["payloads"]) == 4
    body = {"queries": [1, 0, 0], "return": ["payloads"], "max_recalled": 4}
    (found,) = (await limited.post("/v1/sessions/s/attend", json=body)).json()["recalled"]
    assert [len(token["payload"]["text"]) for token in found] == [4_000] * 4


async def test_listings_that_would_be_too_large_are_refused(limited: httpx.AsyncClient) -> None:
    for number in range(40):
        await limited.put(f"/v1/sessions/s{number}", json={"dim": 3, "labels": {"k": "v" * 256}})
        body = {"queries": [[1, 0, 0]] * 8, "return": ["tokens"], "max_recalled": 5}
        assert (await limited.post("/v1/sessions/s/attend", json=body)).status_code == 200
    check_problem(await limited.get("/v1/sessions"), 422, "invalid_argument")
    assert len((await limited.get("/v1/sessions?limit=20")).json()["sessions"]) == 20
    check_problem(await limited.get("/v1/sessions/s/recalls?limit=40"), 422, "invalid_argument")
    assert len((await limited.get("/v1/sessions/s/recalls?limit=2")).json()["recalls"]) == 2


async def test_keys_that_would_be_too_many_are_refused(serve: Serve) -> None:
    async with serve(max_answer_bytes=1_024, max_json_body_bytes=1_024) as client:
        await client.put("/v1/sessions/s", json={"dim": 64, "chunk_size": 1})
        rows = np.ones((3, 64), np.float32)
        for _ in range(2):
            body = safetensors.build({"embeddings": rows}, {})
            headers = {"content-type": safetensors.MEDIA_TYPE}
            assert (await client.post("/v1/sessions/s/memories", content=body, headers=headers)).status_code == 200
        problem = check_problem(await client.get("/v1/sessions/s/chunks?include=keys"), 422, "invalid_argument")
        assert "read at most 4 at once" in problem["detail"]


# --- what is too deep, and what is written to the log ---


def deep_bodies() -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    attend, memories = "/v1/sessions/s/attend", "/v1/sessions/s/memories"
    for name in ("queries", "top_k", "mask", "chunk_mask", "model", "return", "episodes", "rank_by", "timeout_ms"):
        yield "POST", attend, b'{"queries": [1, 0, 0], "%s": %s}' % (name.encode(), DEEP), JSON
    for name in ("embeddings", "payloads", "episode", "if_length"):
        yield "POST", memories, b'{"embeddings": [1, 0, 0], "%s": %s}' % (name.encode(), DEEP), JSON
    yield "POST", attend, b'{"queries": {"b64": "", "shape": %s, "dtype": "float32"}}' % DEEP, JSON
    yield "POST", attend, b'{"queries": {"b64": "", "shape": [1], "dtype": %s}}' % DEEP, JSON
    yield "POST", attend, DEEP, JSON
    yield "POST", "/v1/sessions/s/step", b'{"attend": %s, "append": {}}' % DEEP, JSON
    for name in ("dim", "labels", "ttl_s", "model"):
        yield "PUT", "/v1/sessions/new", b'{"%s": %s}' % (name.encode(), DEEP), JSON
    yield "PATCH", "/v1/sessions/s", b'{"labels": {"a": %s}}' % DEEP, JSON
    binary = {"content-type": safetensors.MEDIA_TYPE}
    place = b'{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    headers = [b'{"queries": %s}' % DEEP, b'{"__metadata__": %s, "queries": %s}' % (DEEP, place)]
    headers += [b'{"queries": %s}' % place.replace(b"[0]", DEEP), b'{"queries": %s}' % place.replace(b"[0, 0]", DEEP)]
    headers += [b'{"queries": %s}' % place.replace(b'"F32"', DEEP), DEEP]
    headers += [orjson.dumps({"__metadata__": {"params": DEEP.decode()}})]
    for header in headers:
        yield "POST", attend, len(header).to_bytes(8, "little") + header, binary


@pytest.mark.parametrize(("method", "path", "body", "headers"), list(deep_bodies()))
async def test_what_is_nested_deeply_is_refused(
    client: httpx.AsyncClient, method: str, path: str, body: bytes, headers: dict[str, str]
) -> None:
    """Its repr, for the sentence of the refusal, exceeded Python's recursion limit: 500."""
    answer = await client.request(method, path, content=body, headers=headers)
    check_problem(answer, answer.status_code, "invalid_argument" if answer.status_code == 422 else "malformed_body")
    assert len(answer.content) < 1_000


async def test_a_client_forges_no_line_of_the_log() -> None:
    """A path, or what an exception quotes, could begin a line of its own."""
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines(LINE))
    forged = "\n2026-11-27 00:00:00,000 CRITICAL api.serving: \x1b[31mall is lost\u2028here"
    engine: Any = FailingEngine(RuntimeError(f"a session called x{forged}"))
    logging.getLogger("api").addHandler(handler)
    try:
        async with talk_to(create_app(Settings(store_url="memory://"), engine=engine)) as client:
            path = "/v1/sessions/x%0a2026-11-27%2000:00:00,000%20CRITICAL%20api.serving:%20lost"
            assert (await client.get(path)).status_code == 500
    finally:
        logging.getLogger("api").removeHandler(handler)
    text = stream.getvalue()
    first, *rest = text.splitlines()
    assert r"x\n2026-11-27 00:00:00,000 CRITICAL" in first
    assert len(rest) > 5 and all(line.startswith("  ") for line in rest)
    assert r"\x1b[31mall is lost" in text and "\x1b" not in text


async def test_long_names_are_cut(client: httpx.AsyncClient) -> None:
    await fill(client, "other")
    answer = await client.post("/v1/sessions/s/attend", json={"queries": [1, 0, 0], "k" * 1_000_000: 1})
    assert len(check_problem(answer, 422, "invalid_argument")["detail"]) < 500
