"""What the clients make of lost, foreign and malformed answers, and of mistakes in the call; on a fake server."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from htm_client import (
    AsyncHTMClient,
    ConnectionFailed,
    HTMClient,
    NotFound,
    RequestRefused,
    ServerUnavailable,
    UnreadableAnswer,
)
from htm_client import safetensors as wire
from htm_client.calls import Call
from htm_client.retry import MAX_DELAY_S, MAX_TOTAL_S, Retry
from htm_client.transport.base import NoResponse, Response

SESSION = {
    "id": "s", "dim": 3, "chunk_size": 2, "model": "retrieval", "dtype": "float32", "open_chunk": "attend",
    "labels": {}, "ttl_s": None, "max_tokens": None, "on_full": "reject", "length": 0, "num_chunks": 0,
    "num_sealed_chunks": 0, "residency": "resident", "bytes": {"device": 0, "host": 0, "stored": 0}, "created_at": "",
    "updated_at": "", "last_used_at": "", "num_appends": 0, "num_attends": 0, "num_queries": 0,
}  # fmt: skip
APPENDED = {"start": 0, "length": 1, "num_chunks": 1}
LOST = httpx.ReadTimeout("late")
REFUSED = httpx.ConnectError("refused")

Outcome = httpx.Response | httpx.TransportError
Do = Callable[[Any], Any]


def problem(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": "why", "status": status})


class Server:
    """Gives these outcomes in order, and keeps what it was asked."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, httpx.TransportError):
            raise outcome
        return outcome


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes one call of either client to a server, without really sleeping."""

    def run_sync(server: Server, do: Do, **options: Any) -> Any:
        with HTMClient("http://fake", transport=httpx.MockTransport(server), sleep=lambda _: None, **options) as client:
            return do(client)

    async def no_sleep(seconds: float) -> None:
        pass

    async def run_async(server: Server, do: Do, **options: Any) -> Any:
        transport = httpx.MockTransport(server)
        async with AsyncHTMClient("http://fake", transport=transport, sleep=no_sleep, **options) as client:
            return await do(client)

    if request.param == "sync":
        return run_sync
    return lambda server, do, **options: asyncio.run(run_async(server, do, **options))


def test_a_new_session_is_not_made_twice(ask: Callable[..., Any]) -> None:
    """The POST was sent again after a lost answer, and left a session that nobody knew of."""
    server = Server(LOST)
    with pytest.raises(ConnectionFailed, match="late"):
        ask(server, lambda client: client.create_session(dim=3))
    server = Server(httpx.Response(502))
    with pytest.raises(ServerUnavailable):
        ask(server, lambda client: client.create_session(dim=3))
    assert len(server.requests) == 1


def test_a_new_session_is_asked_for_again_when_none_was_made(ask: Callable[..., Any]) -> None:
    server = Server(REFUSED, problem(503, "overloaded"), httpx.Response(201, json=SESSION))
    assert ask(server, lambda client: client.create_session(dim=3)).id == "s"
    assert [request.method for request in server.requests] == ["POST"] * 3


def test_a_session_with_an_id_is_asked_for_again(ask: Callable[..., Any]) -> None:
    server = Server(LOST, httpx.Response(200, json=SESSION))
    assert ask(server, lambda client: client.create_session("s", dim=3)).id == "s"
    assert {(request.method, request.url.path) for request in server.requests} == {("PUT", "/v1/sessions/s")}


def test_a_delete_whose_answer_was_lost_succeeds(ask: Callable[..., Any]) -> None:
    """It raised NotFound for the session that it had deleted itself."""
    assert ask(Server(LOST, problem(404, "session_not_found")), lambda client: client.delete_session("s")) is None
    with pytest.raises(NotFound):
        ask(Server(problem(404, "session_not_found")), lambda client: client.delete_session("s"))


def test_a_step_is_sent_again_with_the_same_key(ask: Callable[..., Any]) -> None:
    body = wire.dump({"attend.output": np.ones((1, 3), np.float32)}, {"attend": {"length": 0}, "append": APPENDED})
    server = Server(LOST, httpx.Response(200, content=body, headers={"content-type": wire.MEDIA_TYPE}))
    stepped = ask(server, lambda client: client.step("s", [1, 0, 0], [0, 1, 0], append={"idempotency_key": "k"}))
    assert stepped.appended.length == 1 and stepped.attended.output.shape == (1, 3)
    assert [request.headers["idempotency-key"] for request in server.requests] == ["k", "k"]


def test_an_address_without_a_scheme_fails_at_once() -> None:
    slept: list[float] = []
    with HTMClient("localhost:1", sleep=slept.append) as client, pytest.raises(ConnectionFailed, match="protocol"):
        client.live()
    assert slept == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("2", (2.0, 2.0)), ("999", (MAX_DELAY_S, MAX_DELAY_S)), ("Wed, 21 Oct 2026 07:28:00 GMT", (0.05, 0.1)),
     ("-3", (0.05, 0.1))],
)  # fmt: skip
def test_how_long_the_server_may_ask_to_wait(asked: str, expected: tuple[float, float]) -> None:
    delay_s = Retry(1).delay_s(0, Call("GET", "/"), Response(429, {"retry-after": asked}, b""))
    assert delay_s is not None and expected[0] <= delay_s <= expected[1]


def test_the_delay_grows_and_ends() -> None:
    lost = NoResponse("late", may_be_done=True)
    delays = [Retry(5000).delay_s(attempt, Call("GET", "/"), lost) for attempt in (0, 3, 4999)]
    assert None not in delays and delays == sorted(delays, key=float) and delays[-1] <= MAX_DELAY_S  # type: ignore[arg-type, operator]
    assert Retry(5000).delay_s(5000, Call("GET", "/"), lost) is None
    assert Retry(5000).delay_s(7, Call("GET", "/"), lost, elapsed_s=MAX_TOTAL_S) is None


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>", {}),
        (200, b'["not", "ours"]', {}),
        (200, b'{"hello": "world"}', {}),
        (307, b"", {"location": "http://elsewhere/"}),
        (200, b"\xff" * 20, {"content-type": wire.MEDIA_TYPE}),
        (200, b'{"output": {"b64": "", "shape": [0], "dtype": "zz"}}', {}),
        (200, b'{"output": {"b64": ""}}', {}),
    ],
    ids=["html", "list", "other", "redirect", "bytes", "dtype", "incomplete"],
)
def test_a_foreign_answer(ask: Callable[..., Any], answer: tuple[int, bytes, dict[str, str]]) -> None:
    status, content, headers = answer
    with pytest.raises(UnreadableAnswer):
        ask(Server(httpx.Response(status, content=content, headers=headers)), lambda client: client.session("s"))


def test_an_answer_whose_compression_is_broken(ask: Callable[..., Any]) -> None:
    """httpx's own DecodingError came through."""
    answer = httpx.Response(200, stream=httpx.ByteStream(b"not gzip"), headers={"content-encoding": "gzip"})
    with pytest.raises(UnreadableAnswer, match="compressed"):
        ask(Server(answer), lambda client: client.session("s"))


@pytest.mark.parametrize("binary", [True, False])
def test_labels_that_look_like_a_tensor(ask: Callable[..., Any], binary: bool) -> None:
    """The session was made, and every look at it raised TypeError."""
    labels = {"b64": "x", "shape": "y", "dtype": "z"}
    server = Server(httpx.Response(200, json=SESSION | {"labels": labels}))
    assert ask(server, lambda client: client.session("s"), binary=binary).labels == labels


def test_a_label_that_the_query_cannot_hold() -> None:
    """{"a:b": "c"} was asked for as the label `a` with the value `b:c`."""
    server = Server()
    transport = httpx.MockTransport(server)
    with HTMClient("http://fake", transport=transport) as client, pytest.raises(ValueError, match="colon"):
        list(client.sessions(label={"a:b": "c"}))
    assert server.requests == []


def test_a_problem_that_is_a_list(ask: Callable[..., Any]) -> None:
    with pytest.raises(RequestRefused) as caught:
        ask(Server(httpx.Response(500, json=["x"])), lambda client: client.session("s"))
    assert (caught.value.status, caught.value.code, caught.value.detail) == (500, "unknown", '["x"]')


@pytest.mark.parametrize("session", ["", ".", ".."])
def test_ids_that_would_name_another_path(ask: Callable[..., Any], session: str) -> None:
    """`delete_session("")` did nothing and said nothing; `..` left the collection."""
    server = Server()
    with pytest.raises(ValueError, match="no session id"):
        ask(server, lambda client: client.delete_session(session))
    assert server.requests == []


def test_recall_refuses_several_queries(ask: Callable[..., Any]) -> None:
    """It answered the first and dropped the others."""
    with pytest.raises(ValueError, match="recall_many"):
        ask(Server(), lambda client: client.recall("s", np.eye(3)))


@pytest.mark.parametrize("binary", [True, False])
def test_numpy_numbers_are_numbers(ask: Callable[..., Any], binary: bool) -> None:
    server = Server(httpx.Response(200, json=APPENDED))
    payload = {"n": np.int64(3), "list": np.arange(2), "x": np.float32(0.5)}
    ask(server, lambda client: client.append("s", [1.0], [payload], episode=np.int64(7)), binary=binary)
    content = server.requests[0].content
    params = wire.load(content)[1] if binary else json.loads(content)
    assert params["payloads"] == [{"n": 3, "list": [0, 1], "x": 0.5}] and params["episode"] == 7


@pytest.mark.parametrize(("payload", "error"), [({"x": float("nan")}, ValueError), ({"x": object()}, TypeError)])
def test_payloads_that_are_no_json(ask: Callable[..., Any], payload: Any, error: type[Exception]) -> None:
    server = Server()
    with pytest.raises(error):
        ask(server, lambda client: client.append("s", [1.0], [payload]))
    assert server.requests == []


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2", "<i4", "list"])
def test_embeddings_of_any_kind_are_sent_as_little_endian_float32(ask: Callable[..., Any], dtype: str) -> None:
    numbers = [[0.5, 2.0, -3.0], [1.0, 0.0, 7.0]] if dtype != "<i4" else [[1, 2, -3], [1, 0, 7]]
    given = numbers if dtype == "list" else np.array(numbers, dtype).T.copy().T  # not contiguous
    server = Server(httpx.Response(200, json=APPENDED))
    ask(server, lambda client: client.append("s", given))
    sent = safetensors.numpy.load(server.requests[0].content)["embeddings"]
    assert sent.dtype == np.float32 and sent.tolist() == numbers


def test_the_header_is_padded_and_wide_numbers_are_aligned() -> None:
    data = wire.dump({"mask": np.ones(3, np.bool_), "queries": np.ones((1, 3), np.float32)}, {})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0 and header["queries"]["data_offsets"] == [0, 12] and header["mask"]["data_offsets"] == [12, 15]


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {"a": {"dtype": "F32"}},
        {"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}},
        {"__metadata__": {"params": "{"}},
    ],
)
def test_malformed_safetensors(header: Any) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(ValueError):
        wire.load(len(text).to_bytes(8, "little") + text + b"\0" * 4)
