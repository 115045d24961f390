"""Bodies of the lock-step calls: those of the single calls with sessions in front, as one engine's request per item.

A field is either the same for all items, read as in the single call, or has one value for each, in the order of
`sessions`. Another call of the kind is a table of its fields, and which of them it has per item.
Does not know: HTTP. Raises InvalidArgument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from api.errors import shorten
from api.wire import fields, hot_bodies
from api.wire.fields import HotBody, Reader, Table
from api.wire.hot_bodies import Asked, Selected
from api.wire.tensors import bools, floats
from htm_service.config import MAX_SESSIONS
from htm_service.errors import InvalidArgument, clipped, quoted
from htm_service.records import AppendRequest, AttendRequest, SearchRequest, StepRequest, TruncateRequest

R = TypeVar("R")
Each = list[Any]
"""A value for each session."""


class Batch(NamedTuple, Generic[R]):
    """The sessions, and what is asked of each."""

    sessions: list[str]
    requests: list[R]


@dataclass(frozen=True, slots=True)
class EachOf:
    """Reads a list of values, or null, for each session."""

    reader: Reader

    def __call__(self, name: str, value: Any) -> Each:
        """As a `fields.Reader`."""
        if not isinstance(value, list):
            raise fields.wrong(name, value, "a list, with a value for each session")
        return [None if item is None else self.reader(f"{name}[{at}]", item) for at, item in enumerate(value)]


@dataclass(frozen=True, slots=True)
class OneOrEachOf:
    """Reads one value for all, or a list with one, or null, for each session."""

    reader: Reader

    def __call__(self, name: str, value: Any) -> Any:
        """As a `fields.Reader`."""
        return EachOf(self.reader)(name, value) if isinstance(value, list) else self.reader(name, value)


@dataclass(frozen=True, slots=True)
class Stacked:
    """Reads a tensor with the sessions in front, of so many dimensions in all, as one for each session."""

    reader: Reader
    num_dims: tuple[int, ...]

    def __call__(self, name: str, value: Any) -> Each:
        """As a `fields.Reader`."""
        if not isinstance(value, list):
            array = self.reader(name, value)
            if array.ndim not in self.num_dims:
                expected = " or ".join(map(str, self.num_dims))
                raise InvalidArgument(f"{name} has shape {list(array.shape)}; it must have {expected} dimensions")
            return list(array)
        rows = [self.reader(f"{name}[{at}]", item) for at, item in enumerate(value)]
        for at, row in enumerate(rows):
            if row.shape != rows[0].shape or row.ndim + 1 not in self.num_dims:
                found = f"{name}[{at}] has shape {list(row.shape)}, {name}[0] has {list(rows[0].shape)}"
                raise InvalidArgument(f"{found}; all must have one shape of {_less_one(self.num_dims)} dimensions")
        return rows


def _less_one(num_dims: tuple[int, ...]) -> str:
    return " or ".join(str(number - 1) for number in num_dims)


def stop(name: str, value: Any) -> Any:
    """The field `stop`: one for all, `[Q]` for all, or `[S, Q]` or `[S, 1]` with a list, or null, for each session."""
    is_each = isinstance(value, list) and any(isinstance(item, list) for item in value)
    return EachOf(_stops)(name, value) if is_each else hot_bodies.stop(name, value)


def _stops(name: str, value: Any) -> list[int]:
    if not value:
        raise fields.wrong(name, value, "a list with one for each query, or one for all")
    return fields.integers(name, value)


_ASKED: Mapping[str, Reader] = {"start": OneOrEachOf(fields.integer), "stop": stop}
ATTEND = Table(
    params={**hot_bodies.ATTEND.params, **_ASKED, "model": OneOrEachOf(fields.text)},
    tensors={
        "queries": Stacked(floats, (2, 3)),
        "mask": Stacked(bools, (2,)),
        "chunk_mask": Stacked(bools, (2, 3)),
    },
)
SEARCH = Table(
    params={**hot_bodies.SEARCH.params, "model": OneOrEachOf(fields.text)},
    tensors={"queries": Stacked(floats, (2, 3)), "mask": Stacked(bools, (2,))},
)
SELECT = Table(params={**hot_bodies.SELECT.params, **_ASKED}, tensors=ATTEND.tensors)
TRUNCATE = Table(params={"length": OneOrEachOf(fields.integer), "if_length": EachOf(fields.integer)}, tensors={})
APPEND = Table(
    params={
        "num_tokens": EachOf(fields.integer),
        "payloads": EachOf(fields.payloads),
        "episode": OneOrEachOf(fields.integer),
        "if_length": EachOf(fields.integer),
    },
    tensors={"embeddings": Stacked(floats, (2, 3))},
)


def attend(body: HotBody, request_id: str) -> tuple[Batch[AttendRequest], Asked]:
    """The body of attends."""
    sessions, body = _sessions(body, is_distinct=False)
    body.check_tensors(ATTEND.tensors.keys())
    requests, asked = _attends(body, len(sessions), request_id)
    return Batch(sessions, requests), asked


def search(body: HotBody, request_id: str) -> Batch[SearchRequest]:
    """The body of searches."""
    sessions, body = _sessions(body, is_distinct=False)
    body.check_tensors(SEARCH.tensors.keys())
    per_item, shared = _parted(body, SEARCH, len(sessions), "queries")
    one = hot_bodies.sought({**shared, "queries": per_item["queries"][0]}, request_id)
    return Batch(sessions, _items(lambda item: replace(one, **item), per_item, len(sessions)))


def select(body: HotBody, request_id: str) -> tuple[Batch[AttendRequest], Selected]:
    """The body of selects."""
    sessions, body = _sessions(body, is_distinct=False)
    body.check_tensors(SELECT.tensors.keys())
    per_item, shared = _parted(body, SELECT, len(sessions), "queries")
    wanted = hot_bodies.selected(shared)
    requests, _ = _asked(per_item, shared, request_id)
    return Batch(sessions, requests), wanted


def truncate(body: HotBody) -> Batch[TruncateRequest]:
    """The body of truncations."""
    sessions, body = _sessions(body, is_distinct=False)
    body.check_tensors(TRUNCATE.tensors.keys())
    per_item, shared = _parted(body, TRUNCATE, len(sessions), "length")
    if None in (lengths := per_item.get("length", ())):
        raise InvalidArgument(f"length[{lengths.index(None)}] is null; it must be an integer")
    return Batch(sessions, _items(lambda item: TruncateRequest(**shared, **item), per_item, len(sessions)))


def append(body: HotBody, idempotency_key: str | None) -> Batch[AppendRequest]:
    """The body of appends."""
    sessions, body = _sessions(body)
    body.check_tensors(APPEND.tensors.keys())
    return Batch(sessions, _appends(body, len(sessions), idempotency_key))


def step(body: HotBody, request_id: str, idempotency_key: str | None) -> tuple[Batch[StepRequest], Asked]:
    """The body of steps: attends and appends, each under their name."""
    sessions, body = _sessions(body)
    query, tokens = body.inner("attend"), body.inner("append")
    if unknown := body.params.keys() - {"attend", "append"}:
        raise InvalidArgument(f"unknown field {clipped(min(unknown))}; known are append, attend, sessions")
    body.check_tensors(hot_bodies.STEP_TENSORS)
    attends, asked = _attends(query, len(sessions), request_id)
    appends = _appends(tokens, len(sessions), idempotency_key)
    return Batch(sessions, list(map(StepRequest, attends, appends))), asked


def _attends(body: HotBody, num_sessions: int, request_id: str) -> tuple[list[AttendRequest], Asked]:
    return _asked(*_parted(body, ATTEND, num_sessions, "queries"), request_id)


def _asked(per_item: dict[str, Each], shared: dict[str, Any], request_id: str) -> tuple[list[AttendRequest], Asked]:
    # Copies: a recall is kept for a while, and would keep the queries of all.
    per_item["queries"] = [np.array(queries, ndmin=2) for queries in per_item["queries"]]
    one, asked = hot_bodies.asked({**shared, "queries": per_item["queries"][0]}, request_id)
    if (starts := per_item.get("start")) is not None:
        per_item["start"] = [0 if start is None else start for start in starts]
    if (stops := per_item.pop("stop", None)) is not None:
        per_item["stop"] = [None if of_item is None else max(of_item) for of_item in stops]
        per_item["stops"] = [None if of_item is None or len(of_item) == 1 else tuple(of_item) for of_item in stops]
    return _items(lambda item: replace(one, **item), per_item, len(per_item["queries"])), asked


def _appends(body: HotBody, num_sessions: int, idempotency_key: str | None) -> list[AppendRequest]:
    per_item, shared = _parted(body, APPEND, num_sessions, "embeddings")
    embeddings = [rows if rows.ndim == 2 else rows[None] for rows in per_item.pop("embeddings")]
    most = len(embeddings[0])
    payloads = per_item.pop("payloads", [None] * num_sessions)
    counts = per_item.pop("num_tokens", [None] * num_sessions)
    for at, count in enumerate(counts):
        if count is not None:
            if not 0 <= count <= most:
                raise InvalidArgument(f"{body.where}num_tokens[{at}] is {count}; it must be 0 to {most}")
            embeddings[at] = embeddings[at][:count]
            if payloads[at] is not None and len(payloads[at]) == most:
                payloads[at] = payloads[at][:count]
    one = AppendRequest(embeddings[0], **shared, idempotency_key=idempotency_key)
    per_item |= {"embeddings": embeddings, "payloads": payloads}
    return _items(lambda item: one._replace(**item), per_item, num_sessions)


def _sessions(body: HotBody, *, is_distinct: bool = True) -> tuple[list[str], HotBody]:
    """The ids, and the body without them."""
    found = body.params.get("sessions")
    if found is None:
        raise InvalidArgument("sessions is required")
    if not isinstance(found, list) or not {str}.issuperset(map(type, found)):
        raise InvalidArgument(f"sessions is {shorten(found)}; it must be a list of session ids")
    if not 1 <= len(found) <= MAX_SESSIONS:
        raise InvalidArgument(f"sessions has {len(found)} ids; it must have 1 to {MAX_SESSIONS}")
    if is_distinct and len(set(found)) < len(found):
        twice = next(id_ for at, id_ in enumerate(found) if id_ in found[:at])
        raise InvalidArgument(f"sessions has {quoted(twice)} twice; a session can be appended to once in a request")
    return found, body._replace(params={name: value for name, value in body.params.items() if name != "sessions"})


_EACH = ("model", "start", "stop", "num_tokens", "payloads", "episode", "length", "if_length")
"""Params that may have a value for each session; a `stop` of integers is for each query."""


def _parted(body: HotBody, table: Table, num_sessions: int, required: str) -> tuple[dict[str, Each], dict[str, Any]]:
    """The fields that differ from item to item, and those that all share."""
    found = body.read(table)
    hot_bodies.require(required, found, body)
    per_item: dict[str, Each] = {}
    for name in [*table.tensors, *_EACH]:
        if isinstance(found.get(name), list) and not (name == "stop" and {int}.issuperset(map(type, found[name]))):
            per_item[name] = found.pop(name)
            if len(per_item[name]) != num_sessions:
                wrong = f"{body.where}{name} is of {len(per_item[name])} sessions"
                raise InvalidArgument(f"{wrong}, sessions has {num_sessions}")
    return per_item, found


def _items(make: Callable[[Mapping[str, Any]], R], per_item: Mapping[str, Each], num_sessions: int) -> list[R]:
    """What is asked of each session."""
    return [make({name: values[at] for name, values in per_item.items()}) for at in range(num_sessions)]
