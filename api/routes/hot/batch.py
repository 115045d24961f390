"""The lock-step calls: many sessions in one request. Does not know: what the engine does with it.

An item that fails has a status of its own; the answer to a request that is well formed is 200.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.errors import request_id_of
from api.routes.context import begin, caller_of, engine_of, measured_of, watch_of
from api.routes.hot.calls import idempotency_key, parse
from api.wire import answers, batch_bodies, query
from api.wire.batch_bodies import Batch
from api.wire.body import wire_of
from htm_service.errors import HTMError
from htm_service.records import (
    AppendResult,
    AttendResult,
    SearchResult,
    SelectResult,
    SessionKey,
    StepResult,
    Timing,
    TruncateResult,
)

R = TypeVar("R")


def routes() -> list[Route]:
    """The routes of this module."""
    return [
        Route("/v1/batch/append", append, methods=["POST"]),
        Route("/v1/batch/attend", attend, methods=["POST"]),
        Route("/v1/batch/search", search, methods=["POST"]),
        Route("/v1/batch/step", step, methods=["POST"]),
        Route("/v1/batch/select", select, methods=["POST"]),
        Route("/v1/batch/truncate", truncate, methods=["POST"]),
    ]


async def append(request: Request) -> Response:
    """Add tokens to many sessions."""
    begin(request, "batch_append")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    key = idempotency_key(request)
    batch = await parse(request, wire, lambda body: batch_bodies.append(body, key))
    found = await watch_of(request).unless_gone(request, engine_of(request).batch_append(items_of(request, batch)))
    timing = measured_of(request).worked(sum_of(one.timing for one in found if isinstance(one, AppendResult)))
    return await answers.respond(
        request, reply, lambda raw: answers.batch_append_parts(found), 0, answers.timing_headers(timing)
    )


async def attend(request: Request) -> Response:
    """Answer queries over many sessions."""
    begin(request, "batch_attend")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    batch, asked = await parse(request, wire, lambda body: batch_bodies.attend(body, request_id))
    found = await watch_of(request).unless_gone(request, engine_of(request).batch_attend(items_of(request, batch)))
    timing = measured_of(request).worked(sum_of(one.timing for one in found if isinstance(one, AttendResult)))
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.batch_attend_parts(found, batch.requests[0], asked, raw),
        answers.batch_bytes(found),
        answers.timing_headers(timing),
    )


async def search(request: Request) -> Response:
    """The tokens of many sessions that score best, each on its own."""
    begin(request, "batch_search")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    batch = await parse(request, wire, lambda body: batch_bodies.search(body, request_id))
    found = await watch_of(request).unless_gone(request, engine_of(request).batch_search(items_of(request, batch)))
    done = [one for one in found if isinstance(one, SearchResult)]
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.batch_search_parts(found, batch.requests[0], reply, raw),
        sum(map(answers.search_bytes, done)),
        answers.timing_headers(measured_of(request).worked(sum_of(one.timing for one in done))),
    )


async def step(request: Request) -> Response:
    """Attend to many sessions as they are, then append to them."""
    begin(request, "batch_step")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    key, request_id = idempotency_key(request), request_id_of(request)
    batch, asked = await parse(request, wire, lambda body: batch_bodies.step(body, request_id, key))
    found = await watch_of(request).unless_gone(request, engine_of(request).batch_step(items_of(request, batch)))
    done = [one for one in found if isinstance(one, StepResult)]
    attended, appended = (sum_of(one.attended.timing for one in done), sum_of(one.appended.timing for one in done))
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.batch_step_parts(found, batch.requests[0].attend, asked, raw),
        answers.batch_bytes([one if isinstance(one, HTMError) else one.attended for one in found]),
        answers.timing_headers(measured_of(request).worked(attended, appended)),
        has_written=True,
    )


async def select(request: Request) -> Response:
    """Which chunks queries in key space take of many sessions, with their keys and tokens."""
    begin(request, "batch_select")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    request_id = request_id_of(request)
    batch, asked = await parse(request, wire, lambda body: batch_bodies.select(body, request_id))
    work = engine_of(request).batch_select(items_of(request, batch), keys=asked.keys, tokens=asked.tokens)
    found = await watch_of(request).unless_gone(request, work)
    timing = measured_of(request).worked(sum_of(one.timing for one in found if isinstance(one, SelectResult)))
    return await answers.respond(
        request,
        reply,
        lambda raw: answers.batch_select_parts(found, batch.requests[0], asked),
        answers.batch_select_bytes(found),
        answers.timing_headers(timing),
    )


async def truncate(request: Request) -> Response:
    """Forget what came after a length in many sessions."""
    begin(request, "batch_truncate")
    query.check_names(request, ("encoding",))
    wire = wire_of(request)
    reply = answers.reply_of(request, wire)
    batch = await parse(request, wire, batch_bodies.truncate)
    found = await watch_of(request).unless_gone(request, engine_of(request).batch_truncate(items_of(request, batch)))
    timing = measured_of(request).worked(sum_of(one.timing for one in found if isinstance(one, TruncateResult)))
    return await answers.respond(
        request, reply, lambda raw: answers.batch_truncate_parts(found), 0, answers.timing_headers(timing)
    )


def items_of(request: Request, batch: Batch[R]) -> Sequence[tuple[SessionKey, R]]:
    """What is asked of which session, in the caller's namespace."""
    space = caller_of(request).space
    return [(SessionKey(space, id_), one) for id_, one in zip(batch.sessions, batch.requests, strict=True)]


def sum_of(timings: Iterable[Timing]) -> Timing:
    """Where the time of a whole batch went: of items that were computed together it is the same."""
    found = list(timings) or [Timing()]
    return Timing(
        queue_s=min(timing.queue_s for timing in found),
        compute_s=sum({timing.compute_s for timing in found}),
        store_s=max(timing.store_s for timing in found),
        batch_size=max(timing.batch_size for timing in found),
    )
