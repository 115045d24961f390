"""Answers of the hot calls: tensors and params to JSON or safetensors, and the headers with where time went.

A tensor's name is its place: `chunks.index` is the field `index` of `chunks` in JSON.
Does not know: the engine, and requests beyond the headers that choose the format.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import shorten, status_of
from api.wire import safetensors
from api.wire.body import THREAD_BYTES, hold
from api.wire.hot_bodies import Asked, Selected, Wire
from api.wire.tensors import to_base64, to_lists
from htm_service.errors import HTMError, InvalidArgument
from htm_service.records import (
    FOUND_BYTES,
    AppendResult,
    AttendRequest,
    AttendResult,
    Explanation,
    Memories,
    Recalled,
    SearchAllResult,
    SearchRequest,
    SearchResult,
    SelectResult,
    StepResult,
    Taken,
    Timing,
    TruncateResult,
    recalled_bytes,
)

Reply = Literal["lists", "b64", "safetensors"]
"""How an answer is written."""

PIECE_BYTES = 1 << 20
"""Of a large answer that is handed over before the client has read most of the one before."""

Header = tuple[bytes, bytes]
"""Name and value as they go out."""

_JSON: Header = (b"content-type", b"application/json")
_SAFETENSORS: Header = (b"content-type", safetensors.MEDIA_TYPE.encode())

MEDIA_TYPES: Mapping[Wire, str] = {"json": "application/json", "safetensors": safetensors.MEDIA_TYPE}
_QUALITY = re.compile(r"[01](\.[0-9]{0,3})?")

Tensors = dict[str, npt.NDArray[Any]]
Params = dict[str, Any]
Raw = Callable[[bytes], orjson.Fragment]
"""What puts a JSON text into content as it is."""
T = TypeVar("T")
Outcomes = Sequence[T | HTMError]
"""Of a lock-step batch: a result for each item, or its error."""
Parts = Callable[[Raw], tuple[Tensors, Params]]
"""What makes tensors and params of an answer."""


class Answer(Response):
    """A body with headers as they go out; Starlette's own class encodes each anew."""

    def __init__(self, body: bytes, *headers: Header) -> None:
        self.status_code, self.background = 200, None
        self.body = body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), *headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer; a large one is over when its client has read it, but for the last piece."""
        if len(self.body) <= PIECE_BYTES:
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE_BYTES):
            piece = bytes(self.body[start : start + PIECE_BYTES])
            more = start + PIECE_BYTES < len(self.body)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


def reply_of(request: Request, wire: Wire = "json") -> Reply:
    """The format an answer takes: what `Accept` prefers, else what the request was written in."""
    wire = accepted(request.headers.get("accept", "*/*"), wire)
    encoding = request.query_params.get("encoding", "lists") if request.scope["query_string"] else "lists"
    if encoding not in ("lists", "b64"):
        raise InvalidArgument(f"encoding is {shorten(encoding)}; it must be lists or b64")
    if wire == "safetensors":
        return "safetensors"
    return "b64" if encoding == "b64" else "lists"


@lru_cache
def accepted(header: str, default: Wire) -> Wire:
    """The format that an Accept header gives most weight (RFC 9110, 12.5.1), or the default among equals.

    The default, too, where it takes none of them: an answer that one did not ask for says more than a refusal.
    """
    weights = dict.fromkeys(MEDIA_TYPES, 0.0)
    ranges: dict[str, float] = {}
    for part in header.lower().split(","):
        name, *parameters = (text.strip() for text in part.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        ranges[name] = float(quality) if _QUALITY.fullmatch(quality) else 0.0
    for wire, name in MEDIA_TYPES.items():
        general = (name, "application/*", "*/*")
        weights[wire] = next((ranges[text] for text in general if text in ranges), 0.0)
    return max(weights, key=lambda wire: (weights[wire], wire == default))


class Pieces:
    """Long JSON texts that are put in their places at the very end, by one join, during which other threads run.

    orjson would copy each into a buffer that grows, and hold the interpreter's lock for a fifth of a second of 60 MB.
    """

    def __init__(self, max_bytes: int = sys.maxsize) -> None:
        self._texts: list[bytes] = []
        self._num_bytes = 0
        self._max_bytes = max_bytes

    def raw(self, text: bytes) -> orjson.Fragment:
        """What stands for the text in content that is dumped. Raises InvalidArgument once they are too many bytes."""
        self._num_bytes += len(text)
        if self._num_bytes > self._max_bytes:
            raise InvalidArgument(
                f"the answer has more than {self._num_bytes - 1} bytes, the limit of one answer is {self._max_bytes}: "
                "ask for less"
            )
        self._texts.append(text)
        return orjson.Fragment(b"\0%d\0" % (len(self._texts) - 1))  # no JSON has such a byte

    def dump(self, content: object) -> list[bytes]:
        """The JSON text of the content, in pieces."""
        pieces = orjson.dumps(content).split(b"\0")
        pieces[1::2] = [self._texts[int(place)] for place in pieces[1::2]]
        return pieces


def nest(reply: Reply, tensors: Tensors, params: Params, raw: Raw) -> Params:
    """The content of a JSON answer: params, and each tensor at its place."""
    content = dict(params)
    for name, array in tensors.items():
        *path, last = name.split(".")
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[last] = to_base64(array) if reply == "b64" else raw(to_lists(array))
    return content


def render(reply: Reply, parts: Parts) -> bytes:
    """The body of an answer."""
    tensors, params = parts(orjson.Fragment)
    if reply == "safetensors":
        return safetensors.build(tensors, params)
    return orjson.dumps(nest(reply, tensors, params, orjson.Fragment))


def render_large(reply: Reply, parts: Parts) -> bytes:
    """The same body, put together such that other threads get their turn."""
    pieces = Pieces()
    tensors, params = parts(pieces.raw)
    if reply == "safetensors":
        return b"".join(safetensors.frame(tensors, pieces.dump(params)))
    return b"".join(pieces.dump(nest(reply, tensors, params, pieces.raw)))


async def respond(
    request: Request,
    reply: Reply,
    parts: Parts,
    num_bytes: int,
    headers: Sequence[Header] = (),
    *,
    has_written: bool = False,
) -> Answer:
    """The answer made of `parts`; one of many bytes is put together in a thread. Raises Overloaded, unless the call has
    written something.
    """
    if num_bytes > THREAD_BYTES:
        hold(request, num_bytes, must=has_written)
        body = await asyncio.to_thread(render_large, reply, parts)
        hold(request, max(0, len(body) - num_bytes), must=has_written)
    else:
        body = render(reply, parts)
    return Answer(body, _SAFETENSORS if reply == "safetensors" else _JSON, *headers)


async def respond_json(request: Request, build: Callable[[Raw], Params], max_bytes: int) -> Response:
    """An answer of many items, put together in a thread. Raises InvalidArgument beyond `max_bytes`, Overloaded."""

    def whole() -> bytes:
        pieces = Pieces(max_bytes)
        return b"".join(pieces.dump(build(pieces.raw)))

    body = await asyncio.to_thread(whole)
    if len(body) > max_bytes:
        raise InvalidArgument(f"the answer has {len(body)} bytes, the limit of one answer is {max_bytes}: ask for less")
    if len(body) > THREAD_BYTES:
        hold(request, len(body))
    return Answer(body, _JSON)


def attend_bytes(result: AttendResult) -> int:
    """About how many bytes an attend's answer has."""
    return attend_tensor_bytes(result) + recalled_bytes(result.recalled)


def attend_tensor_bytes(result: AttendResult) -> int:
    """Of its tensors."""
    return sum(array.nbytes for array in (result.output, result.chunk_index, result.chunk_weight))


def select_bytes(result: SelectResult) -> int:
    """About how many bytes a select's answer has."""
    taken = 0 if result.taken is None else result.taken.num_bytes
    return result.chunk_index.nbytes + result.chunk_logit.nbytes + taken


def search_bytes(result: SearchResult) -> int:
    """About how many bytes a search's answer has."""
    embeddings = 0 if result.embeddings is None else result.embeddings.nbytes
    payloads = sum(map(len, result.payloads.values())) if result.payloads else 0
    return result.position.size * FOUND_BYTES + embeddings + payloads


def read_bytes(found: Memories) -> int:
    """About how many bytes the answer has that reads tokens back."""
    num_bytes = 0 if found.embeddings is None else found.embeddings.nbytes
    return num_bytes + sum(len(payload) for payload in found.payloads or () if payload is not None)


def read_parts(found: Memories, raw: Raw) -> tuple[Tensors, Params]:
    """Tensors and params of the answer that reads tokens back."""
    tensors: Tensors = {} if found.embeddings is None else {"embeddings": found.embeddings}
    params: Params = {"start": found.start, "stop": found.stop, "length": found.length}
    if found.payloads is not None:
        params["payloads"] = [None if payload is None else raw(payload) for payload in found.payloads]
    return tensors, params


def attend_parts(result: AttendResult, asked: Asked, payloads: bool, raw: Raw) -> tuple[Tensors, Params]:
    """Tensors and params of an attend's answer: what `return` asked for, and `length`."""
    tensors: Tensors = {}
    if asked.output:
        tensors["output"] = result.output
    if asked.chunks:
        tensors["chunks.index"] = result.chunk_index
        tensors["chunks.weight"] = result.chunk_weight
    params: Params = {"length": result.length}
    if result.recalled is not None:
        params["recalled"] = _recalled(result.recalled, payloads, raw)
    return tensors, params


def explain_parts(found: Explanation, asked: Asked, payloads: bool, raw: Raw) -> tuple[Tensors, Params]:
    """Tensors and params of an explanation's answer."""
    tensors, params = attend_parts(found.attended, Asked(asked.output, chunks=False), payloads, raw)
    ranking = found.ranking
    tensors |= {"chunks.index": ranking.index, "chunks.logit": ranking.logit, "chunks.weight": ranking.weight}
    counts = {"num_taken": ranking.num_taken, "num_visible": ranking.num_visible}
    model = {"model": found.model, "model_hash": found.attended.model_hash, "top_k": found.attended.top_k}
    return tensors, {**model, **counts, **params}


def select_parts(result: SelectResult, wanted: Selected) -> tuple[Tensors, Params]:
    """Tensors and params of a select's answer: what `return` asked for, and `length`."""
    tensors: Tensors = {}
    if wanted.chunks:
        tensors |= {"chunks.index": result.chunk_index, "chunks.logit": result.chunk_logit}
    if (taken := result.taken) is not None:
        tensors |= _unique(taken)
    return tensors, {"length": result.length}


def _unique(taken: Taken) -> Tensors:
    unique = {"index": taken.index, "key": taken.key, "tokens": taken.tokens, "visible": taken.visible}
    return {f"unique.{name}": array for name, array in unique.items() if array is not None}


def search_parts(result: SearchResult, reply: Reply, raw: Raw) -> tuple[Tensors, Params]:
    """Tensors and params of a search's answer: in JSON a list of what was found, in binary its numbers as tensors."""
    tensors: Tensors = {} if result.embeddings is None else {"embeddings": result.embeddings}
    params: Params = {"length": result.length, "chunk_size": result.chunk_size}
    rows = [row[: np.count_nonzero(row >= 0)] for row in result.position]
    if reply == "safetensors":
        tensors |= {"position": result.position, "score": result.score}
        if (texts := result.payloads) is not None:
            params["payloads"] = [[_payload(texts.get(position), raw) for position in row] for row in map(list, rows)]
    else:
        params["found"] = [
            [found_item(result, position, score, raw) for position, score in zip(row.tolist(), scores, strict=False)]
            for row, scores in zip(rows, result.score.tolist(), strict=True)
        ]
    return tensors, params


def batch_search_parts(
    outcomes: Outcomes[SearchResult], request: SearchRequest, reply: Reply, raw: Raw
) -> tuple[Tensors, Params]:
    """The same of many searches, of which the first was `request`; where an item failed nothing is found."""
    queries = np.atleast_2d(request.queries)
    shape = len(queries), max((one.position.shape[1] for one in outcomes if not isinstance(one, HTMError)), default=0)
    tensors: Tensors = {}
    if request.embeddings:
        none = np.zeros((*shape, queries.shape[1]), np.float32)
        tensors["embeddings"] = stacked(outcomes, lambda result: cast("npt.NDArray[Any]", result.embeddings), none)
    params: Params = {
        **batch_params(outcomes),
        "length": listed(outcomes, lambda result: result.length),
        "chunk_size": listed(outcomes, lambda result: result.chunk_size),
    }
    each = [None if isinstance(one, HTMError) else search_parts(one, reply, raw) for one in outcomes]
    if reply == "safetensors":
        absent: Tensors = {"position": np.full(shape, -1), "score": np.zeros(shape, np.float32)}
        for name, nothing in absent.items():
            tensors[name] = np.stack([nothing if one is None else one[0][name] for one in each])
    named = "payloads" if reply == "safetensors" else "found"
    if named == "found" or request.payloads:
        params[named] = [[[] for _ in range(shape[0])] if one is None else one[1][named] for one in each]
    return tensors, params


def search_all_parts(result: SearchAllResult, raw: Raw) -> tuple[Tensors, Params]:
    """Params of the answer to a search through several sessions, and the embeddings [Q, n, D] if asked for."""
    found, rows = [], []
    for query, best in enumerate(result.best):
        items, vectors = [], []
        for session, place in best:
            of = result.results[session]
            item = found_item(of, int(of.position[query, place]), float(of.score[query, place]), raw)
            items.append({"session": result.sessions[session], **item})
            if of.embeddings is not None:
                vectors.append(of.embeddings[query, place])
        found.append(items)
        rows.append(vectors)
    tensors: Tensors = {}
    if any(of.embeddings is not None for of in result.results):
        dim = next(of.embeddings.shape[2] for of in result.results if of.embeddings is not None)
        embeddings = np.zeros((len(rows), max(map(len, rows)), dim), np.float32)
        for row, vectors in zip(embeddings, rows, strict=True):
            if vectors:
                row[: len(vectors)] = vectors
        tensors["embeddings"] = embeddings
    return tensors, {"found": found, "num_sessions": len(result.sessions)}


def found_item(result: SearchResult, position: int, score: float, raw: Raw) -> Params:
    """One found token."""
    params: Params = {"position": position, "score": score, "chunk": position // result.chunk_size}
    if result.payloads is not None:
        params["payload"] = _payload(result.payloads.get(position), raw)
    return params


def _payload(text: bytes | None, raw: Raw) -> object:
    return None if text is None else raw(text)


def step_parts(
    attended: AttendResult, appended: AppendResult, asked: Asked, payloads: bool, raw: Raw
) -> tuple[Tensors, Params]:
    """Tensors and params of a step's answer: the attend's and the append's, each under its name."""
    tensors, params = attend_parts(attended, asked, payloads, raw)
    named = {f"attend.{name}": array for name, array in tensors.items()}
    return named, {"attend": params, "append": append_params(appended)}


def append_params(result: AppendResult) -> Params:
    """An append's answer."""
    return {"start": result.start, "length": result.length, "num_chunks": result.num_chunks}


def batch_bytes(outcomes: Outcomes[AttendResult]) -> int:
    """About how many bytes the answer to many attends has: all are as wide as the widest."""
    found = [outcome for outcome in outcomes if not isinstance(outcome, HTMError)]
    listed_bytes = sum(recalled_bytes(result.recalled) for result in found)
    return len(outcomes) * max(map(attend_tensor_bytes, found), default=0) + listed_bytes


def batch_params(outcomes: Outcomes[Any]) -> Params:
    """What every lock-step answer says: a status for each item, and the errors of those that failed."""
    failed = [(item, outcome) for item, outcome in enumerate(outcomes) if isinstance(outcome, HTMError)]
    errors = [
        {"item": item, **error.extra, "status": status_of(error.code), "code": error.code, "detail": error.detail}
        for item, error in failed
    ]
    status = [200] * len(outcomes)
    for (item, _), error in zip(failed, errors, strict=True):
        status[item] = error["status"]
    return {"status": status, "errors": errors}


def stacked(
    outcomes: Outcomes[T], field: Callable[[T], npt.NDArray[Any]], none: npt.NDArray[Any], fill: float = 0
) -> npt.NDArray[Any]:
    """A field of each result, [S, ...]: zeros where an item failed, `fill` where another one's is wider.

    Like `none` where all failed.
    """
    arrays = [None if isinstance(outcome, HTMError) else field(outcome) for outcome in outcomes]
    found = [array for array in arrays if array is not None]
    if not found:
        return np.zeros((len(outcomes), *none.shape), none.dtype)
    shape = tuple(map(max, zip(*(array.shape for array in found), strict=True)))
    if len(found) == len(outcomes) and {shape} == {array.shape for array in found}:
        return np.stack(found)
    whole = np.zeros((len(outcomes), *shape), found[0].dtype)
    for place, array in zip(whole, arrays, strict=True):
        if array is not None:
            place[:] = fill
            place[tuple(map(slice, array.shape))] = array
    return whole


def listed(outcomes: Outcomes[T], field: Callable[[T], Any], none: Any = 0) -> list[Any]:
    """A field of each result, `none` where an item failed."""
    return [none if isinstance(outcome, HTMError) else field(outcome) for outcome in outcomes]


def batch_attend_parts(
    outcomes: Outcomes[AttendResult], request: AttendRequest, asked: Asked, raw: Raw
) -> tuple[Tensors, Params]:
    """Tensors and params of the answer to many attends, of which the first was `request`."""
    tensors, params = _attends_parts(outcomes, request, asked, raw)
    return tensors, {**batch_params(outcomes), **params}


def batch_append_parts(outcomes: Outcomes[AppendResult]) -> tuple[Tensors, Params]:
    """Tensors, of which there are none, and params of the answer to many appends."""
    return {}, {**batch_params(outcomes), **_appends_params(outcomes)}


def batch_truncate_parts(outcomes: Outcomes[TruncateResult]) -> tuple[Tensors, Params]:
    """Tensors, of which there are none, and params of the answer to many truncations."""
    length = listed(outcomes, lambda result: result.length)
    return {}, {**batch_params(outcomes), "length": length, "num_chunks": listed(outcomes, lambda one: one.num_chunks)}


def batch_select_bytes(outcomes: Outcomes[SelectResult]) -> int:
    """About how many bytes the answer to many selects has: all are as wide as the widest."""
    return len(outcomes) * max((select_bytes(one) for one in outcomes if not isinstance(one, HTMError)), default=0)


def batch_select_parts(
    outcomes: Outcomes[SelectResult], request: AttendRequest, wanted: Selected
) -> tuple[Tensors, Params]:
    """Tensors and params of the answer to many selects, of which the first was `request`.

    Where a session takes fewer chunks than another, `unique.index` is -1, and what the chunks hold 0.
    """
    tensors: Tensors = {}
    none = np.atleast_2d(request.queries)[:, :0]
    if wanted.chunks:
        tensors["chunks.index"] = stacked(outcomes, lambda result: result.chunk_index, none.astype(np.int64), -1)
        tensors["chunks.logit"] = stacked(outcomes, lambda result: result.chunk_logit, none)
    if wanted.keys or wanted.tokens:
        tensors |= _uniques(outcomes, request, wanted)
    params: Params = {"length": listed(outcomes, lambda result: result.length)}
    if wanted.tokens:  # a chunk is as wide as the widest, so its own width is said
        params["chunk_size"] = listed(outcomes, _chunk_size)
    return tensors, {**batch_params(outcomes), **params}


def _chunk_size(result: SelectResult) -> int:
    return 0 if result.taken is None or result.taken.tokens is None else result.taken.tokens.shape[1]


def _uniques(outcomes: Outcomes[SelectResult], request: AttendRequest, wanted: Selected) -> Tensors:
    dim = request.queries.shape[-1]
    nothing = Taken(
        np.zeros(0, np.int64),
        np.zeros((0, dim), np.float32) if wanted.keys else None,
        np.zeros((0, 0, dim), np.float32) if wanted.tokens else None,
        np.zeros((0, 0), np.bool_) if wanted.tokens else None,
    )
    taken = [_unique(nothing if isinstance(one, HTMError) or one.taken is None else one.taken) for one in outcomes]
    fills = {"unique.index": -1}
    return {name: stacked(taken, itemgetter(name), none, fills.get(name, 0)) for name, none in _unique(nothing).items()}


def batch_step_parts(
    outcomes: Outcomes[StepResult], request: AttendRequest, asked: Asked, raw: Raw
) -> tuple[Tensors, Params]:
    """Tensors and params of the answer to many steps: the attends' and the appends', each under their name."""
    attended = [outcome if isinstance(outcome, HTMError) else outcome.attended for outcome in outcomes]
    appended = [outcome if isinstance(outcome, HTMError) else outcome.appended for outcome in outcomes]
    tensors, params = _attends_parts(attended, request, asked, raw)
    named = {f"attend.{name}": array for name, array in tensors.items()}
    return named, {**batch_params(outcomes), "attend": params, "append": _appends_params(appended)}


def _attends_parts(
    outcomes: Outcomes[AttendResult], request: AttendRequest, asked: Asked, raw: Raw
) -> tuple[Tensors, Params]:
    tensors: Tensors = {}
    queries = np.atleast_2d(request.queries)
    if asked.output:
        tensors["output"] = stacked(outcomes, lambda result: result.output, queries)
    if asked.chunks:
        none = queries[:, :0]
        tensors["chunks.index"] = stacked(outcomes, lambda result: result.chunk_index, none.astype(np.int64), -1)
        tensors["chunks.weight"] = stacked(outcomes, lambda result: result.chunk_weight, none)
    params: Params = {
        "length": listed(outcomes, lambda result: result.length),
        "model_hash": listed(outcomes, lambda result: result.model_hash, ""),
    }
    if request.tokens or request.payloads:
        params["recalled"] = listed(outcomes, lambda result: _recalled(result.recalled, request.payloads, raw), [])
    return tensors, params


def _appends_params(outcomes: Outcomes[AppendResult]) -> Params:
    return {
        "start": listed(outcomes, lambda result: result.start),
        "length": listed(outcomes, lambda result: result.length),
        "num_chunks": listed(outcomes, lambda result: result.num_chunks),
    }


def _recalled(rows: Sequence[Sequence[Recalled]] | None, payloads: bool, raw: Raw) -> list[list[Params]]:
    return [[recalled_item(item, payloads, raw) for item in row] for row in rows or ()]


def recalled_item(item: Recalled, payloads: bool, raw: Raw) -> Params:
    """One recalled token; `payload` is there when asked for, null where the token has none."""
    params: Params = {
        "position": item.position,
        "weight": item.weight,
        "score": item.score,
        "chunk": item.chunk,
    }
    if payloads:
        params["payload"] = None if item.payload is None else raw(item.payload)
    return params


def timing_headers(timing: Timing) -> list[Header]:
    """`Server-Timing` in milliseconds, and `X-Batch-Size`."""
    times = (timing.queue_s * 1e3, timing.compute_s * 1e3, timing.store_s * 1e3)
    return [
        (b"server-timing", b"queue;dur=%.3f, compute;dur=%.3f, store;dur=%.3f" % times),
        (b"x-batch-size", b"%d" % timing.batch_size),
    ]


def attend_headers(result: AttendResult, timing: Timing) -> list[Header]:
    """The same of an attend, and `X-Model-Hash`: which weights it was computed with."""
    return [*timing_headers(timing), (b"x-model-hash", result.model_hash.encode())]
