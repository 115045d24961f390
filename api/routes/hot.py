"""The hot calls: append, read back, attend, step. Does not know: what the engine does with a request.

Plain Starlette routes, because FastAPI's own handling costs as much again as everything else that a small attend does
here; `hot_openapi.py` documents them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.errors import request_id_of, shorten
from api.routes.context import engine_of, settings_of, watch_of
from api.wire import answers, hot_bodies
from api.wire.answers import Params, Tensors
from api.wire.body import THREAD_BYTES, read_body, wire_of
from api.wire.fields import HotBody
from api.wire.hot_bodies import Wire
from htm_service.errors import InvalidArgument

T = TypeVar("T")

_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")


def routes() -> list[Route]:
    """The routes of this module."""
    session = "/v1/sessions/{session_id}"
    return [
        Route(f"{session}/attend", attend, methods=["POST"]),
        Route(f"{session}/step", step, methods=["POST"]),
        Route(f"{session}/memories", memories, methods=["GET", "POST"]),
    ]


async def memories(request: Request) -> Response:
    """Append or read back. One route for both, so that other methods are answered 405 with what is allowed."""
    return await (append(request) if request.method == "POST" else read(request))


async def attend(request: Request) -> Response:
    """Answer queries."""
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    query, asked = await parse(request, wire, lambda body: hot_bodies.attend(body, request_id))
    result = await watch_of(request).unless_gone(
        request, engine_of(request).attend(request.path_params["session_id"], query)
    )
    tensors, params = answers.attend_parts(result, asked, query.payloads)
    return await answers.respond(reply, tensors, params, answers.timing_headers(result.timing))


async def append(request: Request) -> Response:
    """Add tokens."""
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    key = idempotency_key(request)
    tokens = await parse(request, wire, lambda body: hot_bodies.append(body, key))
    result = await watch_of(request).unless_gone(
        request, engine_of(request).append(request.path_params["session_id"], tokens)
    )
    headers = answers.timing_headers(result.timing)
    return await answers.respond(reply, {}, answers.append_params(result), headers)


async def step(request: Request) -> Response:
    """Attend to the memory as it is, then append."""
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    key, request_id = idempotency_key(request), request_id_of(request)
    query, asked, tokens = await parse(request, wire, lambda body: hot_bodies.step(body, request_id, key))
    work = engine_of(request).step(request.path_params["session_id"], query, tokens)
    attended, appended = await watch_of(request).unless_gone(request, work)
    tensors, params = answers.attend_parts(attended, asked, query.payloads)
    return await answers.respond(
        reply,
        {f"attend.{name}": array for name, array in tensors.items()},
        {"attend": params, "append": answers.append_params(appended)},
        answers.timing_headers(attended.timing, appended.timing),
    )


async def read(request: Request) -> Response:
    """Read tokens back."""
    reply = answers.reply_of(request)
    start, stop = position(request, "start"), position(request, "stop")
    include = included(request, ("embeddings", "payloads"), default=("embeddings", "payloads"))
    found = await engine_of(request).read(
        request.path_params["session_id"],
        start or 0,
        stop,
        embeddings="embeddings" in include,
        payloads="payloads" in include,
        max_bytes=settings_of(request).max_body_bytes,
    )
    tensors: Tensors = {} if found.embeddings is None else {"embeddings": found.embeddings}
    params: Params = {"start": found.start, "stop": found.stop, "length": found.length}
    if found.payloads is not None:
        params["payloads"] = [answers.raw_json(payload) for payload in found.payloads]
    return await answers.respond(reply, tensors, params)


async def parse(request: Request, wire: Wire, build: Callable[[HotBody], T]) -> T:
    """The engine's request from the body, in a thread when the body is large."""
    settings = settings_of(request)
    header_limit = settings.max_json_body_bytes
    if wire == "json":
        advice = "; send more as application/x-safetensors"
        body = await read_body(request, header_limit, advice)
    else:
        body = await read_body(request, settings.max_body_bytes)
    if len(body) <= THREAD_BYTES:
        return build(hot_bodies.read_body(body, wire, header_limit))
    return await asyncio.to_thread(lambda: build(hot_bodies.read_body(body, wire, header_limit)))


def idempotency_key(request: Request) -> str | None:
    """The header Idempotency-Key, if it is there."""
    key = request.headers.get("idempotency-key")
    if key is not None and _IDEMPOTENCY_KEY.fullmatch(key) is None:
        raise InvalidArgument(
            f"Idempotency-Key {shorten(key)} must be 1 to 255 printable ASCII characters, it has {len(key)}"
        )
    return key


def position(request: Request, name: str) -> int | None:
    """A position in the query string, if it is there."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if re.fullmatch(r"-?[0-9]{1,18}", text) is None:
        raise InvalidArgument(f"{name} is {shorten(text)}; it must be an integer")
    return int(text)


def included(request: Request, choices: tuple[str, ...], default: tuple[str, ...] = ()) -> set[str]:
    """The parts that `include` names, separated by commas."""
    text = request.query_params.get("include")
    if text is None:
        return set(default)
    parts = set(filter(None, text.split(",")))
    if not parts.issubset(choices):
        raise InvalidArgument(f"include is {shorten(text)}; it must be out of {', '.join(choices)}")
    return parts
