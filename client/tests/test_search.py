"""Searches by both clients, in both formats, against an exact scan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from htm_client import BatchFailed, Found, HTMClient, InvalidArgument, InvalidRequest, NotFound

from tests.both_clients import Both

DIM, LENGTH = 131, 500


@pytest.fixture(params=[("sync", True), ("sync", False), ("async", True), ("async", False)], ids=str)
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    kind, binary = request.param
    both = Both(kind, base_url=":memory:", binary=binary)
    for number, name in enumerate(["monday", "tuesday"]):
        both.create_session(name, dim=DIM, chunk_size=7, labels={"user": "ana"})
        payloads = [None if at % 3 == 2 else {"at": at} for at in range(LENGTH)]
        both.append(name, vectors(number), payloads=payloads, episode=number)
    yield both
    both.end()


def vectors(seed: int) -> Any:
    found = np.random.default_rng(seed).standard_normal((LENGTH, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def best(query: Any, tokens: Any, n: int) -> list[int]:
    return [int(at) for at in np.argsort(-(tokens @ query), kind="stable")[:n]]


def test_what_is_found(client: Any) -> None:
    tokens, query = vectors(0), vectors(5)[0]
    for exact in (True, False):
        found = client.search("monday", query, 5, exact=exact)
        assert [item.position for item in found] == best(query, tokens, 5)
        for item in found:
            assert item.score == pytest.approx(float(tokens[item.position] @ query), abs=1e-5)
            assert item.chunk == item.position // 7 and item.session is None and item.embedding is None
            assert item.payload == (None if item.position % 3 == 2 else {"at": item.position})
    rows = client.search_many("monday", vectors(5)[:3], 4, embeddings=True, payloads=False)
    for one, row in zip(vectors(5)[:3], rows, strict=True):
        assert len(set(best(one, tokens, 4)) & {item.position for item in row}) >= 3  # a search may miss one
        assert [item.score for item in row] == sorted((item.score for item in row), reverse=True)
        for item in row:
            np.testing.assert_array_equal(item.embedding, tokens[item.position])
            assert item.payload is None


def test_what_is_visible(client: Any) -> None:
    tokens, query = vectors(0), vectors(5)[0]
    mask = np.zeros(LENGTH, bool)
    mask[[3, 11, 400]] = True
    found = client.search("monday", query, 10, mask=mask)
    assert sorted(item.position for item in found) == [3, 11, 400]
    assert [item.position for item in client.search("monday", query, 2, start=10, stop=12, oversample=9)] == [
        10 + at for at in best(query, tokens[10:12], 2)
    ]
    assert client.search("monday", query, episodes=[7]) == []
    scores = np.sort(tokens @ query)
    found = client.search("monday", query, 1000, min_score=float((scores[-4] + scores[-5]) / 2))
    assert [item.position for item in found] == best(query, tokens, 4)


def test_several_sessions(client: Any) -> None:
    query = vectors(5)[0]
    both = [(float(row @ query), name, at) for n, name in enumerate(NAMES) for at, row in enumerate(vectors(n))]
    wanted = [(name, at) for _, name, at in sorted(both, key=lambda item: -item[0])[:6]]
    for which in ({"sessions": NAMES}, {"label": {"user": "ana"}}, {"label": {"user": "ana"}, "prefix": ""}):
        (found,) = client.search_all(query, 6, embeddings=True, **which)
        assert [(item.session, item.position) for item in found] == wanted
        for item in found:
            np.testing.assert_array_equal(item.embedding, vectors(NAMES.index(item.session))[item.position])
    assert client.search_all(query, prefix="nobody") == [[]]
    rows = client.search_all(vectors(5)[:2], 1, prefix="mon")
    assert [[item.session for item in row] for row in rows] == [["monday"], ["monday"]]


NAMES = ["monday", "tuesday"]


def test_many_sessions_each_by_itself(client: Any) -> None:
    queries = vectors(5)[:2]
    for embeddings in (True, False):
        found = client.batch_search(NAMES, queries, 3, model=["retrieval", None], embeddings=embeddings, exact=True)
        assert found.length.tolist() == [LENGTH, LENGTH] and found.status.tolist() == [200, 200]
        for number, name in enumerate(NAMES):
            one = client.search(name, queries[number], 3, embeddings=embeddings, exact=True)
            (row,) = found.found[number]
            assert [(item.position, item.payload) for item in row] == [(item.position, item.payload) for item in one]
            np.testing.assert_allclose([item.score for item in row], [item.score for item in one], rtol=1e-5)
            for item in row if embeddings else []:
                np.testing.assert_array_equal(item.embedding, vectors(number)[item.position])
    names = ["nobody", "monday"]
    with pytest.raises(BatchFailed, match="1 of 2 items failed: 'nobody': session_not_found"):
        client.batch_search(names, queries)
    found = client.batch_search(names, vectors(5)[:4].reshape(2, 2, DIM), 3, errors="return", payloads=False)
    assert found.status.tolist() == [404, 200] and found.length.tolist() == [0, LENGTH]
    assert found.found[0] == [[], []] and [len(row) for row in found.found[1]] == [3, 3]
    with pytest.raises(TypeError, match="nn"):
        client.batch_search(names, queries, nn=3)


def test_what_is_wrong_is_said(client: Any) -> None:
    with pytest.raises(NotFound):
        client.search("nobody", vectors(5)[0])
    with pytest.raises(NotFound, match="nobody"):
        client.search_all(vectors(5)[0], sessions=["monday", "nobody"])
    with pytest.raises(InvalidRequest, match="n is 0"):
        client.search("monday", vectors(5)[0], 0)
    with pytest.raises(InvalidRequest, match="sessions, label or prefix is required"):
        client.search_all(vectors(5)[0])
    with pytest.raises(InvalidArgument, match=r"search takes one query \[D\], not shape \[2, 131\]; search_many takes"):
        client.search("monday", vectors(5)[:2])
    with pytest.raises(TypeError, match="sessions is a list of session ids, not 'monday'"):
        client.search_all(vectors(5)[0], sessions="monday")
    with pytest.raises(InvalidArgument, match=r"'\.\./x' is no session id"):
        client.search_all(vectors(5)[0], sessions=["../x"])
    with pytest.raises(TypeError, match="nn"):
        client.search("monday", vectors(5)[0], nn=3)


def test_fields_of_later_servers_are_ignored() -> None:
    """Anything more that a server said of a found token was a TypeError."""
    item = {"position": 3, "score": 0.5, "chunk": 0, "payload": None, "age": 7}
    answer = httpx.Response(200, json={"found": [[item]], "length": 9, "chunk_size": 7})
    with HTMClient("http://nowhere", transport=httpx.MockTransport(lambda _: answer), binary=False) as client:
        assert client.search("monday", [0.0]) == [Found(3, 0.5, 0)]


def test_found_is_a_record() -> None:
    assert Found(3, 0.5, 0) == Found(3, 0.5, 0, None, None, None)
