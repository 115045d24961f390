"""Many sessions in one request, by both clients, in both formats; and the recipes of the README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from htm_client import BatchFailed, HTMClient, InvalidArgument, LengthConflict, NotFound, requests

from htm_service.attention.modules import HTMAttention
from tests.both_clients import Both

DIM = 7
README = Path(__file__).parents[1] / "README.md"
NAMES = ["a", "b", "c"]


@pytest.fixture(params=[("sync", True), ("sync", False), ("async", True), ("async", False)], ids=str)
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    kind, binary = request.param
    both = Both(kind, base_url=":memory:", binary=binary)
    for number, name in enumerate(NAMES):
        both.create_session(name, dim=DIM, chunk_size=3)
        both.append(name, vectors(number, 5 + number, DIM))
    yield both
    both.end()


def vectors(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_each_item_is_what_a_single_call_answers(client: Any) -> None:
    queries = vectors(7, 3, 2, DIM)
    found = client.batch_attend(NAMES, queries, model=["retrieval", None, "retrieval"], top_k=2, returns=RETURNS)
    assert (
        found.output.shape == (3, 2, DIM) and found.length.tolist() == [5, 6, 7] and found.status.tolist() == [200] * 3
    )
    for number, name in enumerate(NAMES):
        one = client.attend(name, queries[number], top_k=2, returns=RETURNS)
        np.testing.assert_allclose(found.output[number], one.output, atol=1e-6)
        np.testing.assert_array_equal(found.chunk_index[number], one.chunk_index)
        np.testing.assert_allclose(found.chunk_weight[number], one.chunk_weight, atol=1e-6)
        assert [[token.position for token in row] for row in found.recalled[number]] == [
            [token.position for token in row] for row in one.recalled
        ]
    tokens = vectors(8, 3, 2, DIM)
    payloads = [[{"n": 1}, {"n": 2}], [{"n": 3}], None]
    added = client.batch_append(
        NAMES, tokens, payloads, num_tokens=np.array([2, 1, 0]), episode=[1, 2, 3], if_length=[5, 6, 7]
    )
    assert added.start.tolist() == [5, 6, 7] and added.length.tolist() == [7, 7, 7]
    np.testing.assert_array_equal(client.read("b", 6).embeddings, tokens[1, :1])
    assert client.read("a", 5).payloads == payloads[0]
    stepped = client.batch_step(
        NAMES, queries[:, 0], tokens[:, 0], attend={"top_k": 1}, append={"payloads": [[{"s": name}] for name in NAMES]}
    )
    assert stepped.attended.length.tolist() == stepped.appended.start.tolist() == [7, 7, 7]
    assert stepped.attended.output.shape == (3, 1, DIM) and client.read("c", 7).payloads == [{"s": "c"}]


RETURNS = ["output", "chunks", "tokens"]


def test_each_item_says_which_weights_it_was_computed_with(client: Any) -> None:
    model = client.put_model("m", HTMAttention(DIM, heads=2, topk_mems=2, mem_chunk_size=3))
    retrieval, names, queries = client.model("retrieval"), ["a", "nobody", "b"], vectors(7, 3, DIM)
    asked: Any = {"model": ["m", None, "retrieval"]}
    for attended in (
        client.batch_attend(names, queries, errors="return", **asked),
        client.batch_step(names, queries, queries, attend=asked, errors="return").attended,
    ):
        assert attended.model_hash == [model.hash, "", retrieval.hash] and model.hash != retrieval.hash


def test_items_that_fail_are_raised_or_returned(client: Any) -> None:
    names, tokens = ["a", "nobody", "b"], vectors(9, 3, DIM)
    with pytest.raises(BatchFailed, match=r"2 of 3 items failed: 'nobody': session_not_found .404") as caught:
        client.batch_append(names, tokens, if_length=[5, None, 99])
    missing, conflict = caught.value.errors
    assert (missing.item, missing.session) == (1, "nobody") and isinstance(missing.error, NotFound)
    assert isinstance(conflict.error, LengthConflict) and conflict.error.length == 6
    assert caught.value.result.start.tolist() == [5, 0, 0] and client.session("a").length == 6
    found = client.batch_append(names, tokens, if_length=[5, None, 6], errors="return")
    assert found.status.tolist() == [409, 404, 200] and [error.item for error in found.errors] == [0, 1]
    assert found.start.tolist() == [0, 0, 6]
    stepped = client.batch_step(names, tokens, tokens, errors="return")
    assert stepped.status.tolist() == [200, 404, 200] and not stepped.attended.output[1].any()


def test_a_key_makes_it_the_same_batch(client: Any) -> None:
    tokens = vectors(9, 3, DIM)
    first = client.batch_step(NAMES, tokens, tokens, append={"idempotency_key": "step-1"})
    again = client.batch_step(NAMES, tokens, tokens, append={"idempotency_key": "step-1"})
    np.testing.assert_array_equal(first.appended.start, again.appended.start)
    np.testing.assert_allclose(first.attended.output, again.attended.output, atol=1e-6)
    assert client.session("a").length == 6


def test_what_is_wrong_is_not_sent(client: Any) -> None:
    tokens = vectors(9, 3, DIM)
    wrong: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "a list of session ids", lambda: client.batch_attend("abc", tokens)),
        (InvalidArgument, "is no session id", lambda: client.batch_attend(["a", "b c"], tokens)),
        (
            InvalidArgument,
            "it must be 'raise' or 'return'",
            lambda: client.batch_attend(NAMES, tokens, errors="ignore"),
        ),
        (TypeError, "has no option 'k'", lambda: client.batch_attend(NAMES, tokens, k=3)),
        (TypeError, "has no option 'topk'", lambda: client.batch_step(NAMES, tokens, tokens, attend={"topk": 3})),
        (TypeError, "integer", lambda: client.batch_append(NAMES, tokens, num_tokens=[1.5, 1, 1])),
        (
            TypeError,
            r"payloads\[0\] must be an object",
            lambda: client.batch_append(NAMES, tokens, [["text"], None, None]),
        ),
        (InvalidArgument, "different shapes", lambda: client.batch_append(NAMES, [[1.0], [1.0, 2.0], [3.0]])),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()
    assert client.session("a").length == 5


def test_selects_and_truncations_are_those_of_single_calls(client: Any) -> None:
    queries = vectors(7, 3, 2, DIM)
    stops = [[4, 5], None, np.array([6])]
    found = client.batch_select(NAMES, queries, top_k=1, start=np.array([1, 0, 2]), stop=stops)
    assert found.unique_index.shape == found.unique_visible.shape[:2] and found.length.tolist() == [5, 6, 7]
    for number, (name, start, stop) in enumerate(zip(NAMES, [1, 0, 2], [[4, 5], None, 6], strict=True)):
        one = client.select(name, queries[number], top_k=1, start=start, **({} if stop is None else {"stop": stop}))
        np.testing.assert_array_equal(found.chunk_index[number], one.chunk_index)
        np.testing.assert_allclose(found.chunk_logit[number], one.chunk_logit, atol=1e-6)
        num_taken = len(one.unique_index)
        assert (found.unique_index[number, num_taken:] == -1).all()
        for field in ("unique_index", "unique_key", "unique_tokens", "unique_visible"):
            np.testing.assert_allclose(getattr(found, field)[number, :num_taken], getattr(one, field), atol=1e-6)
    named = client.batch_select(NAMES, queries[:, 0], returns=["chunks"], errors="return")
    assert named.chunk_index.shape[:2] == (3, 1) and named.unique_index is None and named.errors == []
    cut = client.batch_truncate([*NAMES, "nobody"], [2, 9, 3, 0], if_length=[5, None, 7, None], errors="return")
    assert cut.status.tolist() == [200, 422, 200, 404] and cut.length.tolist() == [2, 0, 3, 0]
    assert cut.num_chunks.tolist() == [1, 0, 1, 0]
    with pytest.raises(BatchFailed, match="1 of 2 items failed: 'a': length_conflict"):
        client.batch_truncate(["a", "b"], if_length=[5, 6])
    assert [client.session(name).length for name in NAMES] == [2, 0, 3]
    with pytest.raises(TypeError, match="integer"):
        client.batch_truncate(NAMES, 1.5)


def test_any_number_of_sessions_is_reset(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as few requests as that takes; what is there is reset, whatever is not."""
    monkeypatch.setattr(requests, "MAX_SESSIONS", 2)
    client.reset(name for name in NAMES)
    client.reset("a")
    client.reset([])
    assert [client.session(name).length for name in NAMES] == [0, 0, 0]
    client.append("b", vectors(1, DIM))
    with pytest.raises(BatchFailed, match="'nobody': session_not_found"):
        client.reset(["nobody", "b"])
    assert client.session("b").length == 0


def test_the_recipes_of_the_readme() -> None:
    """Environments in lock-step, and an agent of several layers: what stands there runs, and prints what it says."""
    codes = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    recipes = [code for code in codes if "batch_" in code]
    assert len(recipes) == 2
    printed: list[tuple[Any, ...]] = []
    with HTMClient(":memory:") as client:
        for recipe in recipes:
            exec(recipe, {"np": np, "client": client, "print": lambda *values: printed.append(values)})
        lengths = {session.id: session.length for session in client.sessions(prefix="layer-")}
    (output, steps), (read,) = printed
    assert output == (64, 1, 4) and steps.tolist() == [1] * 64 and read == (2, 8, 4)
    assert len(lengths) == 16 and set(lengths.values()) == {1}
