"""Both clients against the server's app in this process, in both formats; and against a fake server that fails."""

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from htm_client import (
    ConnectionFailed,
    Forbidden,
    InvalidArgument,
    InvalidRequest,
    LengthConflict,
    NotFound,
    ServerUnavailable,
    SessionConflict,
    Unauthenticated,
)
from htm_client import (
    safetensors as wire,
)

from tests.both_clients import Both

DIM = 7


@pytest.fixture(params=[("sync", True), ("sync", False), ("async", True), ("async", False)], ids=str)
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    kind, binary = request.param
    both = Both(kind, base_url=":memory:", binary=binary)
    yield both
    both.end()


def vectors(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_stop_for_each_query(client: Any) -> None:
    """A trajectory that is replayed: each query sees what was there at its time."""
    client.create_session("a", dim=DIM, chunk_size=3)
    tokens = vectors(1, 11, DIM)
    client.append("a", tokens)
    whole = client.attend("a", tokens, stop=np.arange(11), returns=["output", "chunks"])
    for position, query in enumerate(tokens):
        alone = client.attend("a", query, stop=position)
        np.testing.assert_allclose(whole.output[position], alone.output[0], rtol=1e-4, atol=1e-5)
    assert (whole.chunk_index[0] == -1).all() and whole.length == 11


def test_branches(client: Any) -> None:
    tokens = vectors(1, 11, DIM)
    client.create_session("a", dim=DIM, chunk_size=3, labels={"team": "x"})
    client.append("a", tokens)
    forked = client.fork("a", "b", 7, labels={"try": "2"})
    assert (forked.id, forked.length, forked.labels, forked.chunk_size) == ("b", 7, {"try": "2"}, 3)
    whole = client.fork("a")
    assert (whole.length, whole.labels) == (11, {"team": "x"})
    truncated = client.truncate("a", 4, if_length=11)
    assert (truncated.length, truncated.num_chunks) == (4, 2)
    with pytest.raises(LengthConflict) as refused:
        client.truncate("a", 2, if_length=11)
    assert refused.value.length == 4
    with pytest.raises(InvalidRequest, match="length is 5"):
        client.truncate("a", 5)
    with pytest.raises(SessionConflict, match="exists already"):
        client.fork("a", "b")
    with pytest.raises(InvalidArgument, match="is no session id"):
        client.fork("a", "a/b")
    np.testing.assert_allclose(client.read("b").embeddings, tokens[:7], rtol=1e-6)
    client.reset(["a", "b"])
    client.reset(whole.id)
    assert [client.session(name).length for name in ("a", "b", whole.id)] == [0, 0, 0]
    client.delete_session("b")
    client.delete_session("b", missing_ok=True)
    with pytest.raises(NotFound):
        client.delete_session("b")


def test_the_life_of_a_session(client: Any) -> None:
    info = client.create_session("a", dim=DIM, chunk_size=3, labels={"team": "x"})
    assert (info.id, info.dim, info.length, info.labels) == ("a", DIM, 0, {"team": "x"})
    tokens = vectors(1, 11, DIM)
    payloads = [{"n": i, "text": "ü" * i} if i % 2 else None for i in range(11)]
    assert client.append("a", tokens[:10], payloads=payloads[:10], if_length=0).length == 10
    assert client.append("a", tokens[10].tolist(), payloads=payloads[10:]).num_chunks == 4

    attended = client.attend("a", tokens[4], top_k=2, returns=["output", "chunks", "payloads"], max_recalled=3)
    assert attended.output.shape == (1, DIM) and attended.chunk_index.shape == (1, 2)
    assert attended.chunk_weight.sum() == pytest.approx(1.0, abs=1e-5)
    assert attended.length == 11 and attended.batch_size == 1 and attended.request_id
    assert {"queue", "compute"} <= attended.timing_ms.keys()
    assert len(attended.recalled[0]) == 3
    only = client.attend("a", vectors(2, 2, DIM), returns=["chunks"], mask=np.ones(11, bool), chunk_mask=[True] * 4)
    assert only.output is None and only.recalled is None and only.chunk_index.shape == (2, 4)

    best = client.recall("a", tokens[5], n=2)
    assert best[0].position == 5 and best[0].payload == payloads[5] and len(best) == 2
    assert [row[0].position for row in client.recall_many("a", tokens[[7, 9]], n=1)] == [7, 9]

    stepped = client.step("a", tokens[0], tokens[0], attend={"top_k": 1}, append={"payloads": [{"n": 11}]})
    assert stepped.attended.length == 11 and stepped.appended.length == 12 and stepped.attended.output.shape == (1, DIM)

    memories = client.read("a", 2, 11)
    np.testing.assert_array_equal(memories.embeddings, tokens[2:])
    assert memories.payloads == payloads[2:] and memories.length == 12
    assert client.read("a", embeddings=False).embeddings is None

    chunks = list(client.chunks("a", keys=True))
    assert [chunk.stop for chunk in chunks] == [3, 6, 9, 12] and len(chunks[0].key) == DIM
    detail = client.chunk("a", 1, embeddings=True)
    np.testing.assert_allclose(detail.embeddings, tokens[3:6], rtol=1e-6)
    assert detail.payloads == payloads[3:6] and detail.chunk.sealed
    assert client.recalls("a", limit=1)[0].top_k == 1

    client.attend("a", tokens[5], top_k=2, note="the fifth?")
    assert client.recalls("a", limit=1)[0].note == "the fifth?"
    why = client.explain("a", tokens[5], top_k=2, limit=3, returns=["payloads"], max_recalled=1)
    assert (why.num_taken, why.num_visible, why.model, why.top_k, why.length) == (2, 4, "retrieval", 2, 12)
    assert sorted(why.chunk_weight.tolist(), reverse=True) == why.chunk_weight.tolist() and why.chunk_weight[2] == 0
    assert (np.diff(why.chunk_logit) <= 0).all() and len(set(why.chunk_index.tolist())) == 3 and why.output is None
    attended = client.attend("a", tokens[5], top_k=2, returns=["chunks", "payloads"], max_recalled=1)
    assert [list(why.chunk_index[:2])] == attended.chunk_index.tolist() and why.recalled == attended.recalled[0]
    selected = client.select("a", tokens[[5, 6]], top_k=2, stop=10)
    assert selected.chunk_index.shape == selected.chunk_logit.shape == (2, 2) and selected.length == 12
    num_unique = len(selected.unique_index)
    assert selected.unique_key.shape == (num_unique, DIM) and selected.unique_visible.dtype == bool
    np.testing.assert_array_equal(
        selected.unique_tokens[selected.unique_visible],
        [tokens[at] for chunk in selected.unique_index for at in range(3 * chunk, min(3 * chunk + 3, 10))],
    )
    only = client.select("a", tokens[5], returns=["chunks"])
    assert only.unique_index is only.unique_tokens is None and only.chunk_index.shape == (1, 4)
    client.create_session("b", dim=DIM, labels={"team": "y"})
    assert client.delete_sessions(label={"team": "y"}) == 1 and client.delete_sessions(prefix="b") == 0

    assert client.update_session("a", labels={}, ttl_s=60.0).ttl_s == 60
    made = client.create_session(dim=3)
    assert made.dim == 3
    client.delete_session(made.id)  # its id is random, and may begin with "a"
    assert [item.id for item in client.sessions(prefix="a")] == ["a"]
    assert list(client.sessions(label={"team": "x"})) == []
    assert client.models()[0].name == "retrieval" and client.info()["version"]
    client.ready()
    client.delete_session("a")
    with pytest.raises(NotFound, match="session_not_found"):
        client.session("a")


def test_errors_are_typed_and_carry_what_the_server_says(client: Any) -> None:
    client.create_session("a", dim=DIM)
    client.append("a", vectors(1, 3, DIM))
    with pytest.raises(LengthConflict) as caught:
        client.append("a", vectors(1, 3, DIM), if_length=0)
    assert caught.value.length == 3 and caught.value.code == "length_conflict" and caught.value.status == 409
    with pytest.raises(SessionConflict, match="dim"):
        client.create_session("a", dim=3)
    with pytest.raises(InvalidRequest, match=r"shape \[3, 5\]") as invalid:
        client.append("a", vectors(1, 3, 5))
    assert invalid.value.request_id and invalid.value.detail
    assert client.session("a").length == 3


def test_a_key_makes_a_repeated_append_harmless(client: Any) -> None:
    client.create_session("a", dim=DIM)
    first = client.append("a", vectors(1, 3, DIM), idempotency_key="k")
    assert client.append("a", vectors(1, 3, DIM), idempotency_key="k") == first
    assert client.session("a").length == 3


def test_more_sessions_than_a_page(client: Any) -> None:
    for i in range(103):
        client.create_session(f"s{i:03}", dim=1)
    assert [item.id for item in client.sessions()] == [f"s{i:03}" for i in range(103)]


# --- retries, on a fake server ---


class Fake:
    """Answers in order; remembers what it was asked and how long the client slept."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def sleep_async(self, seconds: float) -> None:
        self.slept.append(seconds)


def fake_client(kind: str, fake: Fake, **options: Any) -> Both:
    sleep: Callable[[float], Any] | Callable[[float], Awaitable[None]] = (
        fake.sleep if kind == "sync" else fake.sleep_async
    )
    return Both(kind, base_url="http://fake", transport=httpx.MockTransport(fake), sleep=sleep, **options)


def problem(status: int, code: str, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"code": code, "detail": "why", "status": status}, headers=headers)


APPENDED = {"start": 0, "length": 1, "num_chunks": 1}


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_append_is_sent_again_with_the_same_key(kind: str) -> None:
    fake = Fake(
        httpx.ConnectError("refused"),
        problem(503, "overloaded", **{"Retry-After": "2"}),
        httpx.ReadTimeout("late"),
        httpx.Response(200, json=APPENDED),
    )
    client = fake_client(kind, fake)
    assert client.append("s", [1.0]).length == 1
    keys = {request.headers["idempotency-key"] for request in fake.requests}
    assert len(fake.requests) == 4 and len(keys) == 1 and len(keys.pop()) == 32
    assert 0.05 <= fake.slept[0] <= 0.1 and fake.slept[1] == 2.0
    client.end()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_retries_end(kind: str) -> None:
    fake = Fake(*[problem(503, "draining")] * 3)
    client = fake_client(kind, fake, retries=2)
    with pytest.raises(ServerUnavailable, match=r"draining \(503\): why"):
        client.session("s")
    assert len(fake.requests) == 3
    fake.answers = [httpx.ConnectError("refused")] * 3
    with pytest.raises(ConnectionFailed, match="refused"):
        client.session("s")
    client.end()


@pytest.mark.parametrize("status", [400, 404, 409, 422, 500, 504, 507])
def test_other_errors_are_not_sent_again(status: int) -> None:
    fake = Fake(problem(status, "some_code"))
    client = fake_client("sync", fake)
    with pytest.raises(Exception, match="some_code"):
        client.session("s")
    assert len(fake.requests) == 1
    client.end()


def test_an_answer_that_is_no_problem_document() -> None:
    client = fake_client("sync", Fake(httpx.Response(418, content=b"<html>teapot")))
    with pytest.raises(InvalidRequest, match="teapot"):
        client.session("s")
    client.end()


def test_the_api_key_and_the_path_are_sent() -> None:
    fake = Fake(httpx.Response(204))
    client = fake_client("sync", fake, api_key="secret")
    client.delete_session("a~b.c")
    assert fake.requests[0].headers["authorization"] == "Bearer secret"
    assert fake.requests[0].url.path == "/v1/sessions/a~b.c"
    client.end()


def test_what_a_key_does_not_open_has_errors_of_its_own() -> None:
    """They are wrong requests too, and are not tried again."""
    for status, code, kind in ((401, "unauthenticated", Unauthenticated), (403, "forbidden", Forbidden)):
        fake = Fake(httpx.Response(status, json={"code": code, "detail": "there is no key"}))
        client = fake_client("sync", fake)
        with pytest.raises(kind, match="there is no key") as caught:
            client.info()
        assert isinstance(caught.value, InvalidRequest) and caught.value.code == code and len(fake.requests) == 1
        client.end()


def test_safetensors_as_others_write_and_read_it() -> None:
    tensors = {
        "a": vectors(1, 2, 3),
        "b": np.array([[1, -1]], np.int64),
        "c": np.array([True, False]),
        "d": vectors(1, 0, 3),
    }
    data = wire.dump(tensors, {"x": "ü"})
    theirs = safetensors.numpy.load(data)
    assert theirs.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(theirs[name], array)
    ours, params = wire.load(safetensors.numpy.save(tensors, {"params": json.dumps({"x": 1})}))
    assert params == {"x": 1}
    for name, array in tensors.items():
        np.testing.assert_array_equal(ours[name], array)
    with pytest.raises(ValueError, match="no safetensors"):
        wire.load(b"\xff" * 12)


def test_torch_tensors_are_taken() -> None:
    import torch

    fake = Fake(httpx.Response(200, json=APPENDED))
    client = fake_client("sync", fake)
    client.append("s", torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    tensors, _ = wire.load(fake.requests[0].content)
    np.testing.assert_array_equal(tensors["embeddings"], np.ones((2, 3), np.float32))
    client.end()
