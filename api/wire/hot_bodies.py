"""Bodies of the hot calls, JSON or safetensors, to the engine's records: pure functions of bytes.

Does not know: HTTP. Raises MalformedBody, InvalidArgument, BodyTooLarge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import orjson

from api.errors import shorten
from api.wire import fields, safetensors
from api.wire.fields import HotBody, Table
from api.wire.tensors import bools, floats
from htm_service.errors import InvalidArgument, MalformedBody, clipped
from htm_service.records import AppendRequest, AttendRequest, SearchRequest

Wire = Literal["json", "safetensors"]
"""How a body is written."""


def returns(name: str, value: Any) -> set[str]:
    """The field `return`."""
    return fields.some_of(name, value, ("output", "chunks", "tokens", "payloads"))


def stop(name: str, value: Any) -> int | list[int]:
    """The field `stop`: one for all queries, or one for each."""
    if isinstance(value, list):
        if not value:
            raise fields.wrong(name, value, "an integer, or a list of one for each query")
        return fields.integers(name, value)
    return fields.integer(name, value)


def rank_by(name: str, value: Any) -> str:
    """The field `rank_by`."""
    return fields.one_of(name, value, ("weight", "score"))


ATTEND = Table(
    params={
        "return": returns,
        "model": fields.text,
        "top_k": fields.integer,
        "start": fields.integer,
        "stop": stop,
        "episodes": fields.integers,
        "max_recalled": fields.integer,
        "rank_by": rank_by,
        "timeout_ms": fields.number,
        "note": fields.text,
    },
    tensors={"queries": floats, "mask": bools, "chunk_mask": bools},
)


def select_returns(name: str, value: Any) -> set[str]:
    """The field `return` of a select."""
    return fields.some_of(name, value, ("chunks", "keys", "tokens"))


EXPLAIN = Table(params={**ATTEND.params, "limit": fields.integer}, tensors=ATTEND.tensors)
RANKED = 100
"""Chunks that an explanation lists when it does not say."""
SELECT = Table(
    params={
        "return": select_returns,
        **{name: ATTEND.params[name] for name in ("top_k", "start", "stop", "episodes", "timeout_ms")},
    },
    tensors=ATTEND.tensors,
)


def search_returns(name: str, value: Any) -> set[str]:
    """The field `return` of a search."""
    return fields.some_of(name, value, ("payloads", "embeddings"))


SEARCH = Table(
    params={
        "return": search_returns,
        "n": fields.integer,
        "exact": fields.boolean,
        "oversample": fields.integer,
        "min_score": fields.number,
        "stop": fields.integer,
        **{name: ATTEND.params[name] for name in ("model", "start", "episodes", "timeout_ms")},
    },
    tensors={"queries": floats, "mask": bools},
)
WHERE = {"sessions": fields.texts, "label": fields.mapping, "prefix": fields.text}
"""The sessions of a search through several."""
SEARCH_ALL = Table(
    params={name: reader for name, reader in {**SEARCH.params, **WHERE}.items() if name not in ("start", "stop")},
    tensors={"queries": floats},
)
APPEND = Table(
    params={
        "payloads": fields.payloads,
        "episode": fields.integer,
        "if_length": fields.integer,
    },
    tensors={"embeddings": floats},
)


STEP_TENSORS = {**ATTEND.tensors, **APPEND.tensors}.keys()
"""Those of a step stand side by side."""


class Asked(NamedTuple):
    """What an attend's `return` asks for."""

    output: bool
    chunks: bool


class Selected(NamedTuple):
    """What a select's `return` asks for."""

    chunks: bool
    keys: bool
    tokens: bool


def read_body(body: bytes | bytearray, wire: Wire, max_header_bytes: int) -> HotBody:
    """The fields of a body."""
    if wire == "safetensors":
        tensors, params = safetensors.parse(body, max_header_bytes)
        return HotBody(params, tensors)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"the body is {shorten(value)}; it must be a JSON object")
    return HotBody(value, None)


def attend(body: HotBody, request_id: str) -> tuple[AttendRequest, Asked]:
    """The body of an attend."""
    body.check_tensors(ATTEND.tensors.keys())
    return _attend(body, request_id)


def explain(body: HotBody, request_id: str) -> tuple[AttendRequest, Asked, int]:
    """The body of an explanation: an attend's, and how many chunks to list."""
    body.check_tensors(EXPLAIN.tensors.keys())
    found = body.read(EXPLAIN)
    limit: int = found.pop("limit", RANKED)
    found.setdefault("return", set())
    require("queries", found, body)
    return *asked(found, request_id), limit


def select(body: HotBody, request_id: str) -> tuple[AttendRequest, Selected]:
    """The body of a select: of an attend's fields those that say what is seen, and how many chunks are taken."""
    body.check_tensors(SELECT.tensors.keys())
    found = body.read(SELECT)
    require("queries", found, body)
    wanted = selected(found)
    request, _ = asked(found, request_id)
    return request, wanted


def selected(found: dict[str, Any]) -> Selected:
    """What a select is to answer, taken out of its fields."""
    wanted: set[str] = found.pop("return", {"chunks", "keys", "tokens"})
    return Selected("chunks" in wanted, "keys" in wanted, "tokens" in wanted)


class Where(NamedTuple):
    """Which sessions are searched: those named, or those with these labels and this prefix."""

    sessions: list[str] | None
    labels: dict[str, str]
    prefix: str


def search(body: HotBody, request_id: str) -> SearchRequest:
    """The body of a search."""
    body.check_tensors(SEARCH.tensors.keys())
    found = body.read(SEARCH)
    require("queries", found, body)
    return sought(found, request_id)


def search_all(body: HotBody, request_id: str) -> tuple[SearchRequest, Where]:
    """The body of a search through several sessions."""
    body.check_tensors(SEARCH_ALL.tensors.keys())
    found = body.read(SEARCH_ALL)
    where = Where(found.pop("sessions", None), found.pop("label", {}), found.pop("prefix", ""))
    if where.sessions is None and not (where.labels or where.prefix):
        raise InvalidArgument("sessions, label or prefix is required")
    if where.sessions is not None and (where.labels or where.prefix):
        raise InvalidArgument("sessions are named, and label or prefix is given too; one of the two it can be")
    require("queries", found, body)
    return sought(found, request_id), where


def sought(found: dict[str, Any], request_id: str) -> SearchRequest:
    """What a search's fields say, `queries` among them."""
    wanted: set[str] = found.pop("return", {"payloads"})
    timeout_ms: float | None = found.pop("timeout_ms", None)
    if "n" in found:
        found["num_wanted"] = found.pop("n")
    return SearchRequest(
        **found,
        payloads="payloads" in wanted,
        embeddings="embeddings" in wanted,
        timeout_s=_seconds(timeout_ms),
        request_id=request_id,
    )


def append(body: HotBody, idempotency_key: str | None) -> AppendRequest:
    """The body of an append."""
    body.check_tensors(APPEND.tensors.keys())
    return _append(body, idempotency_key)


def step(body: HotBody, request_id: str, idempotency_key: str | None) -> tuple[AttendRequest, Asked, AppendRequest]:
    """The body of a step: an attend and an append, each under its name; their tensors side by side."""
    query, tokens = body.inner("attend"), body.inner("append")
    if unknown := body.params.keys() - {"attend", "append"}:
        raise InvalidArgument(f"unknown field {clipped(min(unknown))}; known are append, attend")
    body.check_tensors(STEP_TENSORS)
    return *_attend(query, request_id), _append(tokens, idempotency_key)


def _attend(body: HotBody, request_id: str) -> tuple[AttendRequest, Asked]:
    found = body.read(ATTEND)
    require("queries", found, body)
    return asked(found, request_id)


def asked(found: dict[str, Any], request_id: str) -> tuple[AttendRequest, Asked]:
    """The fields of an attend, `queries` among them, as the engine takes them."""
    if isinstance(stops := found.get("stop"), list):
        found |= {"stop": max(stops), "stops": tuple(stops)}
    wanted: set[str] | None = found.pop("return", None)
    timeout_ms: float | None = found.pop("timeout_ms", None)
    if wanted is None:
        return AttendRequest(**found, timeout_s=_seconds(timeout_ms), request_id=request_id), Asked(True, False)
    request = AttendRequest(
        **found,
        tokens=not wanted.isdisjoint(("tokens", "payloads")),
        payloads="payloads" in wanted,
        timeout_s=_seconds(timeout_ms),
        request_id=request_id,
    )
    return request, Asked("output" in wanted, "chunks" in wanted)


def _append(body: HotBody, idempotency_key: str | None) -> AppendRequest:
    found = body.read(APPEND)
    require("embeddings", found, body)
    return AppendRequest(**found, idempotency_key=idempotency_key)


def require(name: str, found: Mapping[str, Any], body: HotBody) -> None:
    """Raises InvalidArgument when a field is not there."""
    if name not in found:
        raise InvalidArgument(f"{body.where}{name} is required")


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
