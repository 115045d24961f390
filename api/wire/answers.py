"""Answers of the hot calls: tensors and params to JSON or safetensors, and the headers with where time went.

A tensor's name is its place: `chunks.index` is the field `index` of `chunks` in JSON.
Does not know: the engine, and requests beyond the headers that choose the format.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt
import orjson
from starlette.requests import Request
from starlette.responses import Response

from api.errors import shorten
from api.wire import safetensors
from api.wire.body import THREAD_BYTES
from api.wire.hot_bodies import Asked, Wire
from api.wire.tensors import to_base64, to_lists
from htm_service.errors import InvalidArgument
from htm_service.records import AppendResult, AttendResult, Recalled, Timing

Reply = Literal["lists", "b64", "safetensors"]
"""How an answer is written."""

Header = tuple[bytes, bytes]
"""Name and value as they go out."""

_JSON: Header = (b"content-type", b"application/json")
_SAFETENSORS: Header = (b"content-type", safetensors.MEDIA_TYPE.encode())

Tensors = dict[str, npt.NDArray[Any]]
Params = dict[str, Any]


class Answer(Response):
    """A body with headers as they go out; Starlette's own class encodes each anew."""

    def __init__(self, body: bytes, *headers: Header) -> None:
        self.status_code, self.background = 200, None
        self.body = body
        self.raw_headers = [(b"content-length", b"%d" % len(body)), *headers]


def reply_of(request: Request, wire: Wire = "json") -> Reply:
    """The format an answer takes: what `Accept` names, else what the request was written in."""
    accept = request.headers.get("accept", "*/*")
    if safetensors.MEDIA_TYPE in accept:
        wire = "safetensors"
    elif "application/json" in accept:
        wire = "json"
    encoding = request.query_params.get("encoding", "lists") if request.scope["query_string"] else "lists"
    if encoding not in ("lists", "b64"):
        raise InvalidArgument(f"encoding is {shorten(encoding)}; it must be lists or b64")
    if wire == "safetensors":
        return "safetensors"
    return "b64" if encoding == "b64" else "lists"


def render(reply: Reply, tensors: Mapping[str, npt.NDArray[Any]], params: Mapping[str, Any]) -> bytes:
    """The body of an answer."""
    if reply == "safetensors":
        return safetensors.build(tensors, params)
    content = dict(params)
    for name, array in tensors.items():
        *path, last = name.split(".")
        place = content
        for part in path:
            place = place.setdefault(part, {})
        place[last] = to_base64(array) if reply == "b64" else to_lists(array)
    return orjson.dumps(content)


async def respond(reply: Reply, tensors: Tensors, params: Params, headers: Sequence[Header] = ()) -> Answer:
    """The answer; a large one is built in a thread."""
    if sum(array.nbytes for array in tensors.values()) > THREAD_BYTES:
        body = await asyncio.to_thread(render, reply, tensors, params)
    else:
        body = render(reply, tensors, params)
    return Answer(body, _SAFETENSORS if reply == "safetensors" else _JSON, *headers)


def attend_parts(result: AttendResult, asked: Asked, payloads: bool) -> tuple[Tensors, Params]:
    """Tensors and params of an attend's answer: what `return` asked for, and `length`."""
    tensors: Tensors = {}
    if asked.output:
        tensors["output"] = result.output
    if asked.chunks:
        tensors["chunks.index"] = result.chunk_index
        tensors["chunks.weight"] = result.chunk_weight
    params: Params = {"length": result.length}
    if result.recalled is not None:
        params["recalled"] = [[recalled_item(item, payloads) for item in row] for row in result.recalled]
    return tensors, params


def append_params(result: AppendResult) -> Params:
    """An append's answer."""
    return {"start": result.start, "length": result.length, "num_chunks": result.num_chunks}


def recalled_item(item: Recalled, payloads: bool) -> Params:
    """One recalled token; `payload` is there when asked for, null where the token has none."""
    params: Params = {
        "position": item.position,
        "weight": item.weight,
        "score": item.score,
        "chunk": item.chunk,
    }
    if payloads:
        params["payload"] = raw_json(item.payload)
    return params


def raw_json(text: bytes | None) -> orjson.Fragment | None:
    """A payload, spliced into an answer as it was stored."""
    return None if text is None else orjson.Fragment(text)


def timing_headers(first: Timing, second: Timing | None = None) -> list[Header]:
    """`Server-Timing` in milliseconds, summed over the parts of a step; `X-Batch-Size` of the first part."""
    queue, compute, store = first.queue_s, first.compute_s, first.store_s
    if second is not None:
        queue, compute, store = queue + second.queue_s, compute + second.compute_s, store + second.store_s
    times = b"queue;dur=%.3f, compute;dur=%.3f, store;dur=%.3f" % (queue * 1e3, compute * 1e3, store * 1e3)
    return [(b"server-timing", times), (b"x-batch-size", b"%d" % first.batch_size)]
