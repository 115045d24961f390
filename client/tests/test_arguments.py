"""What a caller hands over wrongly is told by name, and nothing is sent."""

from __future__ import annotations

import asyncio
import datetime
import json
import pickle
from collections import UserDict
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from htm_client import AsyncHTMClient, ConnectionFailed, HTMClient, InvalidArgument
from htm_client import safetensors as wire

APPENDED = {"start": 0, "length": 1, "num_chunks": 1}


class Sent:
    """Makes one call with either client, in either format; what it sent is kept."""

    def __init__(self, is_async: bool, binary: bool) -> None:
        self.is_async = is_async
        self.binary = binary
        self.requests: list[httpx.Request] = []

    def __call__(self, do: Callable[[Any], Any]) -> Any:
        transport = httpx.MockTransport(self.answer)
        if not self.is_async:
            with HTMClient("http://fake", transport=transport, binary=self.binary) as client:
                return do(client)

        async def call() -> Any:
            async with AsyncHTMClient("http://fake", transport=transport, binary=self.binary) as client:
                return await do(client)

        return asyncio.run(call())

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200, json=APPENDED)

    @property
    def params(self) -> Any:
        content = self.requests[-1].content
        return wire.load(content)[1] if self.binary else json.loads(content)


@pytest.fixture(params=[(False, True), (False, False), (True, True)], ids=["sync", "sync JSON", "async"])
def sent(request: pytest.FixtureRequest) -> Sent:
    return Sent(*request.param)


MISSPELT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "payload": (lambda c: c.append("s", [1, 0], payload=[{"text": "milk"}]), "'payload'.*payloads"),
    "if_lenght": (lambda c: c.append("s", [1, 0], if_lenght=99), "'if_lenght'.*if_length"),
    "step's append": (lambda c: c.step("s", [1], [1], append={"payload": [{}]}), "'payload'.*payloads"),
    "step's attend": (lambda c: c.step("s", [1], [1], attend={"topk": 3}), "'topk'.*top_k"),
    "attend": (lambda c: c.attend("s", [1], return_=["chunks"]), "'return_'.*returns"),
    "recall": (lambda c: c.recall("s", [1], max_recalled=3), "'max_recalled'.* n,"),
    "recall_many": (lambda c: c.recall_many("s", [[1]], returns=["output"]), "'returns'.*rank_by"),
    "create": (lambda c: c.create_session("s", dims=3), "'dims'.*dim,"),
    "create without an id": (lambda c: c.create_session(dim=3, ttl=3), "'ttl'.*ttl_s"),
    "update": (lambda c: c.update_session("s", label={}), "'label'.*labels"),
}


@pytest.mark.parametrize("kind", MISSPELT)
def test_a_misspelt_option(sent: Sent, kind: str) -> None:
    """`payload=` was dropped and the token stored without it; `if_lenght=` appended without a condition."""
    do, message = MISSPELT[kind]
    with pytest.raises(TypeError, match=message):
        sent(do)
    assert not sent.requests


def test_every_option_that_there_is(sent: Sent) -> None:
    conditions = {"episode": 1, "if_length": 0, "idempotency_key": "k"}
    sent(lambda client: client.append("s", [1.0], payloads=[{"a": 1}], **conditions))
    assert sent.params["if_length"] == 0 and sent.params["payloads"] == [{"a": 1}]


# --- tensors ---

ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "given",
    [
        [torch.ones(3, requires_grad=True), torch.ones(3)],
        [torch.ones(3, dtype=torch.bfloat16)] * 2,
        (torch.ones(3, dtype=torch.float64), [1, 1, 1]),
        [[torch.tensor(1.0)] * 3, np.ones(3)],
        [np.ones(3), [np.float16(1), 1, True]],
        torch.ones(2, 3, dtype=torch.int8),
        torch.complex(torch.ones(2, 3), -torch.ones(2, 3)).conj().imag,  # a view that numpy cannot have
        [[Decimal(1), Fraction(1), 1]] * 2,
        np.ma.masked_array(np.ones((2, 3)), mask=False),
        np.ones((2, 3), np.longdouble),
    ],
    ids=lambda given: f"{type(given).__name__}",
)
def test_lists_of_tensors_are_stacked(given: Any) -> None:
    """`[torch.ones(3, requires_grad=True)]` was a RuntimeError of torch's, and `[bfloat16]` a TypeError."""
    sent = Sent(is_async=False, binary=True)
    sent(lambda client: client.append("s", given))
    np.testing.assert_array_equal(wire.load(sent.requests[0].content)[0]["embeddings"], ONES)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (np.array([1 + 2j]), r"complex128.*1\.\+2\.j"),
        ([1 + 2j], r"1\+2j"),
        (torch.tensor([1 + 2j]), r"complex64.*1\.\+2\.j"),
        ([torch.tensor([1 + 2j])], r"complex64"),
        (np.ma.masked_array([1.0, 2.0], mask=[False, True]), "mask"),
        ([np.ma.masked_array([1.0, 2.0], mask=[False, True])], "mask"),
        ([1.0, np.ma.masked], "mask"),
        (np.array(["2026-11-27"], "M8[D]"), "datetime64"),
        (np.array([3], "m8[s]"), "timedelta64"),
        (["1.5"], "1.5"),
        ([1.0, None], "None"),
        (None, "None"),
        ({"a": 1}, "a"),
    ],
)
def test_what_would_lose_something_is_no_tensor(sent: Sent, given: Any, named: str) -> None:
    """Imaginary parts and masks were lost, a date was a number, None was NaN."""
    with pytest.raises(TypeError, match=named):
        sent(lambda client: client.append("s", given))
    if given is not None:  # no mask
        with pytest.raises(TypeError, match=named):
            sent(lambda client: client.attend("s", [1.0], chunk_mask=given))
    assert not sent.requests


def test_rows_of_different_shapes(sent: Sent) -> None:
    with pytest.raises(InvalidArgument, match=r"\[2\], \[3\]"):
        sent(lambda client: client.append("s", [torch.ones(3), torch.ones(2)]))


def test_masks_of_tensors(sent: Sent) -> None:
    mask = [torch.tensor(True), torch.tensor(0, dtype=torch.bfloat16), 2]
    sent(lambda client: client.attend("s", [1.0], mask=mask))
    if sent.binary:
        assert wire.load(sent.requests[0].content)[0]["mask"].tolist() == [True, False, True]


# --- payloads ---


@pytest.mark.parametrize(
    ("payload", "error", "named"),
    [
        ({"x": float("nan")}, InvalidArgument, "Out of range float"),
        ({"x": object()}, TypeError, "object"),
        ({"x": np.longdouble(0.5)}, TypeError, "longdouble"),
        ({"x": np.ones(2, np.longdouble)}, TypeError, "longdouble"),
        ({"x": np.datetime64("2026-11-27T00:00:00.000000001")}, TypeError, "datetime64"),
        ({"x": np.array(["2026-11-27"], "M8[ns]")}, TypeError, "2026-11-27"),
        ({"x": np.timedelta64(3, "ns")}, TypeError, "timedelta64"),
        ({"x": datetime.date(2026, 11, 27)}, TypeError, "date"),
        ({"x": 1j}, TypeError, "complex"),
        ({"x": np.complex64(1j)}, TypeError, "complex"),
        ({"x": b"bytes"}, TypeError, "bytes"),
        (["no object"], TypeError, "no object"),
        ("text", TypeError, "text"),
    ],
)
def test_a_payload_that_cannot_be_sent_is_named(sent: Sent, payload: Any, error: type[Exception], named: str) -> None:
    """A longdouble recursed, a date became a number, and no error said which of the payloads it was of."""
    given = [{"a": 1}, None, payload, {"b": float("nan")}]
    for do in (
        lambda client: client.append("s", np.eye(4), given),
        lambda client: client.step("s", [1.0] * 4, np.eye(4), append={"payloads": given}),
    ):
        with pytest.raises(error, match=rf"payloads\[2\].*{named}"):
            sent(do)
    assert not sent.requests


def test_a_payload_without_an_end(sent: Sent) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(InvalidArgument, match=r"payloads\[0\]"):
        sent(lambda client: client.append("s", [1.0], [endless]))


def test_any_mapping_is_a_payload(sent: Sent) -> None:
    sent(lambda client: client.append("s", [1.0], [UserDict(a=UserDict(b=1))]))
    assert sent.params["payloads"] == [{"a": {"b": 1}}]


def test_one_payload_is_no_list_of_them(sent: Sent) -> None:
    """Its names were taken for payloads."""
    with pytest.raises(TypeError, match="payloads is a list"):
        sent(lambda client: client.append("s", [1.0], {"text": "milk"}))


# --- names ---


@pytest.mark.parametrize("session", ["", ".", "..", "a@b", "a/b", "a b", "ü", "a" * 129, "a\n", "a%40b"])
def test_what_is_no_session_id(sent: Sent, session: str) -> None:
    """A bare 404, or another path than that of a session."""
    for do in (
        lambda client: client.create_session(session, dim=3),
        lambda client: client.append(session, [1.0]),
        lambda client: client.chunk(session, 0),
        lambda client: client.delete_session(session),
    ):
        with pytest.raises(InvalidArgument, match="A-Z a-z 0-9"):
            sent(do)
    assert not sent.requests


@pytest.mark.parametrize("session", [None, 3, b"s"])
def test_a_session_that_is_no_text(sent: Sent, session: Any) -> None:
    """`session(None)` said "quote_from_bytes() expected bytes"."""
    with pytest.raises(TypeError, match=rf"a session id is a string, not {session!r}"):
        sent(lambda client: client.session(session))


def test_a_chunk_is_a_number(sent: Sent) -> None:
    with pytest.raises(TypeError):
        sent(lambda client: client.chunk("s", "../../other"))


@pytest.mark.parametrize("key", ["", " ", " a", "a ", "ü", "a\r\nX: y", "a" * 256])
def test_an_idempotency_key_that_no_header_can_hold(sent: Sent, key: str) -> None:
    """An empty one was replaced in silence, others failed in the HTTP library or on the server."""
    for do in (
        lambda client: client.append("s", [1.0], idempotency_key=key),
        lambda client: client.step("s", [1.0], [1.0], append={"idempotency_key": key}),
    ):
        with pytest.raises(InvalidArgument, match="idempotency_key"):
            sent(do)
    with pytest.raises(TypeError, match="idempotency_key"):
        sent(lambda client: client.append("s", [1.0], idempotency_key=7))
    assert not sent.requests


def test_names_of_answers_are_a_list(sent: Sent) -> None:
    """It was taken for a list of letters."""
    with pytest.raises(TypeError, match="returns is a list"):
        sent(lambda client: client.attend("s", [1.0], returns="output"))


@pytest.mark.parametrize("make", [HTMClient, AsyncHTMClient])
def test_no_key_is_taken_from_the_environment(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that sends a secret to whatever address it is given must have been given that too."""
    monkeypatch.setenv("HTM_API_KEY", "a-secret-of-the-shell")
    client = make("http://127.0.0.1:1")
    assert b"a-secret-of-the-shell" not in pickle.dumps(client)


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1:1", "ftp://me:secret@127.0.0.1", "http://me:secret@host:x"]
)
@pytest.mark.parametrize("is_async", [False, True])
def test_no_error_tells_the_password_of_an_address(url: str, is_async: bool) -> None:
    """Whoever read the log of a client that met no server read its password."""

    async def ask() -> None:
        async with AsyncHTMClient(url, retries=0) as client:
            await client.live()

    with pytest.raises((ConnectionFailed, InvalidArgument)) as caught:
        if is_async:
            asyncio.run(ask())
        else:
            HTMClient(url, retries=0).live()
    assert "secret" not in str(caught.value) and "://" in str(caught.value)


def test_what_json_has_not_is_told_before_it_is_sent(sent: Sent) -> None:
    """It was a bare ValueError, where everything else that is wrong is an InvalidArgument."""
    with pytest.raises(InvalidArgument, match="cannot be sent as JSON"):
        sent(lambda client: client.create_session("s", dim=1, ttl_s=float("nan")))
    with pytest.raises(InvalidArgument, match="cannot be sent as JSON"):
        sent(lambda client: client.attend("s", [1.0], timeout_ms=float("inf")))
    assert not sent.requests


def test_an_integer_that_no_float_holds(sent: Sent) -> None:
    """It was numpy's OverflowError."""
    with pytest.raises(InvalidArgument, match="too large"):
        sent(lambda client: client.append("s", [10**400]))
