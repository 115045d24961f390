"""The calls with tensors: append, read back, attend, explain, select, search, step. Does not know what becomes of them.

Plain Starlette routes, because FastAPI's own handling costs as much again as everything else that a small attend does
here; `openapi.py` documents them.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.errors import request_id_of, shorten
from api.routes.context import begin, caller_of, check_still, engine_of, key_of, measured_of, settings_of, watch_of
from api.wire import answers, hot_bodies, query
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
        Route(f"{session}/explain", explain, methods=["POST"]),
        Route(f"{session}/select", select, methods=["POST"]),
        Route(f"{session}/search", search, methods=["POST"]),
        Route("/v1/search", search_all, methods=["POST"]),
        Route(f"{session}/step", step, methods=["POST"]),
        Route(f"{session}/memories", memories, methods=["GET", "POST"]),
    ]


async def memories(request: Request) -> Response:
    """Append or read back. One route for both, so that other methods are answered 405 with what is allowed."""
    return await (append(request) if request.method == "POST" else read(request))


async def attend(request: Request) -> Response:
    """Answer queries."""
    begin(request, "attend")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    wanted, asked = await parse(request, wire, lambda body: hot_bodies.attend(body, request_id))
    result = await watch_of(request).unless_gone(request, engine_of(request).attend(key_of(request), wanted))
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.attend_parts(result, asked, wanted.payloads, raw),
        answers.attend_bytes(result),
        answers.attend_headers(result, measured_of(request).worked(result.timing)),
    )


async def explain(request: Request) -> Response:
    """Rank the chunks for one query."""
    begin(request, "explain")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    wanted, asked, limit = await parse(request, wire, lambda body: hot_bodies.explain(body, request_id))
    found = await watch_of(request).unless_gone(request, engine_of(request).explain(key_of(request), wanted, limit))
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.explain_parts(found, asked, wanted.payloads, raw),
        answers.attend_bytes(found.attended) + found.ranking.index.nbytes,
        answers.attend_headers(found.attended, measured_of(request).worked(found.attended.timing)),
    )


async def select(request: Request) -> Response:
    """Which chunks queries in key space take, with their keys and tokens."""
    begin(request, "select")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    wanted, asked = await parse(request, wire, lambda body: hot_bodies.select(body, request_id))
    work = engine_of(request).select(key_of(request), wanted, keys=asked.keys, tokens=asked.tokens)
    result = await watch_of(request).unless_gone(request, work)
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.select_parts(result, asked),
        answers.select_bytes(result),
        answers.timing_headers(measured_of(request).worked(result.timing)),
    )


async def search(request: Request) -> Response:
    """The tokens that score best."""
    begin(request, "search")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    wanted = await parse(request, wire, lambda body: hot_bodies.search(body, request_id))
    result = await watch_of(request).unless_gone(request, engine_of(request).search(key_of(request), wanted))
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.search_parts(result, reply, raw),
        answers.search_bytes(result),
        answers.timing_headers(measured_of(request).worked(result.timing)),
    )


async def search_all(request: Request) -> Response:
    """The tokens of several sessions that score best."""
    begin(request, "search_all")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    wanted, where = await parse(request, wire, lambda body: hot_bodies.search_all(body, request_id))
    work = engine_of(request).search_all(caller_of(request).space, wanted, where.sessions, where.labels, where.prefix)
    result = await watch_of(request).unless_gone(request, work)
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.search_all_parts(result, raw),
        sum(map(answers.search_bytes, result.results)),
        answers.timing_headers(measured_of(request).worked(result.timing)),
    )


async def append(request: Request) -> Response:
    """Add tokens."""
    begin(request, "append")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    key = idempotency_key(request)
    tokens = await parse(request, wire, lambda body: hot_bodies.append(body, key))
    result = await watch_of(request).unless_gone(request, engine_of(request).append(key_of(request), tokens))
    params, headers = answers.append_params(result), answers.timing_headers(measured_of(request).worked(result.timing))
    return await answers.respond(request, reply, lambda raw: ({}, params), 0, headers)


async def step(request: Request) -> Response:
    """Attend to the memory as it is, then append."""
    begin(request, "step")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    key, request_id = idempotency_key(request), request_id_of(request)
    wanted, asked, tokens = await parse(request, wire, lambda body: hot_bodies.step(body, request_id, key))
    work = engine_of(request).step(key_of(request), wanted, tokens)
    attended, appended = await watch_of(request).unless_gone(request, work)
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.step_parts(attended, appended, asked, wanted.payloads, raw),
        answers.attend_bytes(attended),
        answers.attend_headers(attended, measured_of(request).worked(attended.timing, appended.timing)),
        has_written=True,
    )


async def read(request: Request) -> Response:
    """Read tokens back."""
    begin(request, "read_memories")
    query.check_names(request, ("start", "stop", "include", "encoding"))
    reply = answers.reply_of(request)
    start, stop = query.position(request, "start"), query.position(request, "stop")
    include = query.included(request, ("embeddings", "payloads"), default=("embeddings", "payloads"))
    found = await engine_of(request).read(
        key_of(request),
        start or 0,
        stop,
        embeddings="embeddings" in include,
        payloads="payloads" in include,
    )
    return await answers.respond(request, reply, lambda raw: answers.read_parts(found, raw), answers.read_bytes(found))


async def parse(request: Request, wire: Wire, build: Callable[[HotBody], T]) -> T:
    """The engine's request from the body, in a thread when the body is large."""
    settings = settings_of(request)
    header_limit = settings.max_json_body_bytes
    if wire == "json":
        advice = "; send more as application/x-safetensors"
        body = await read_body(request, header_limit, advice)
    else:
        body = await read_body(request, settings.max_body_bytes)
    check_still(request)
    if len(body) <= THREAD_BYTES:
        parsed = build(hot_bodies.read_body(body, wire, header_limit))
    else:
        parsed = await asyncio.to_thread(lambda: build(hot_bodies.read_body(body, wire, header_limit)))
    measured_of(request).parsed_at = time.perf_counter()
    return parsed


def idempotency_key(request: Request) -> str | None:
    """The header Idempotency-Key, if it is there."""
    key = request.headers.get("idempotency-key")
    if key is not None and _IDEMPOTENCY_KEY.fullmatch(key) is None:
        raise InvalidArgument(
            f"Idempotency-Key {shorten(key)} must be 1 to 255 printable ASCII characters, it has {len(key)}"
        )
    return key
