"""Inspection: the chunks of a session, what recalls took of them, the last recalls. Does not know: how they came."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from api.openapi import SESSION_CODES, problems
from api.routes.context import JsonRoute, engine_of, key_of, settings_of
from api.schemas.views import Chunk, ChunkDetail, ChunkPage, Heat, Recall, Recalls, to_json
from api.wire.answers import Params, Raw, respond_json
from api.wire.query import included
from api.wire.tensors import to_lists
from htm_service import records
from htm_service.config import MAX_BINS


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(prefix="/v1/sessions/{session_id}", tags=["inspection"], route_class=JsonRoute)
    routes.add_api_route(
        "/chunks",
        chunks,
        methods=["GET"],
        operation_id="list_chunks",
        response_model=ChunkPage,
        responses=problems((*SESSION_CODES, "out_of_memory")),
    )
    routes.add_api_route(
        "/chunks/{index}",
        chunk,
        methods=["GET"],
        operation_id="inspect_chunk",
        response_model=ChunkDetail,
        responses=problems((*SESSION_CODES, "chunk_not_found", "out_of_memory")),
    )
    routes.add_api_route(
        "/heat",
        heat,
        methods=["GET"],
        operation_id="session_heat",
        responses=problems(SESSION_CODES),
    )
    routes.add_api_route(
        "/recalls",
        recalls,
        methods=["GET"],
        operation_id="list_recalls",
        response_model=Recalls,
        responses=problems(SESSION_CODES),
    )
    return routes


async def chunks(
    request: Request,
    session_id: str,
    cursor: Annotated[str | None, Query(description="From the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Chunks per page.")] = 100,
    include: Annotated[str | None, Query(description="`keys` adds the summary keys.")] = None,
) -> Response:
    """List the chunks of a session, a page at a time."""
    keys = "keys" in included(request, ("keys",))
    page = await engine_of(request).chunks(key_of(request), cursor, limit, keys=keys)
    return await respond_json(
        request,
        lambda raw: {"chunks": [_view(info, raw) for info in page.chunks], "cursor": page.cursor},
        settings_of(request).max_answer_bytes,
    )


async def chunk(
    request: Request,
    session_id: str,
    index: Annotated[int, Path(le=2**53, description="Counted from 0.")],
    include: Annotated[str | None, Query(description="`embeddings`, `key`, or both with a comma.")] = None,
) -> Response:
    """Inspect one chunk: the payloads of its tokens, and on request its embeddings and summary key."""
    parts = included(request, ("embeddings", "key"))
    detail = await engine_of(request).chunk(
        key_of(request), index, embeddings="embeddings" in parts, key="key" in parts
    )
    return await respond_json(request, lambda raw: _detail(detail, raw), settings_of(request).max_answer_bytes)


def _detail(detail: records.ChunkDetail, raw: Raw) -> Params:
    return {
        "chunk": _view(detail.chunk, raw),
        "payloads": [None if payload is None else raw(payload) for payload in detail.payloads],
        "embeddings": None if detail.embeddings is None else raw(to_lists(detail.embeddings)),
    }


def _view(info: records.ChunkInfo, raw: Raw) -> Params:
    key = None if info.key is None else raw(to_lists(info.key))
    return {**Chunk.of(info).model_dump(mode="json"), "key": key}


async def heat(
    request: Request,
    session_id: str,
    first: Annotated[int, Query(ge=0, le=2**53, description="First chunk.")] = 0,
    last: Annotated[int | None, Query(ge=0, le=2**53, description="The chunk after the last; all if left out.")] = None,
    bins: Annotated[int, Query(ge=1, le=MAX_BINS, description="At most so many runs.")] = 600,
) -> Heat:
    """Sum up what recalls took of a session's chunks, in so many runs that they can be drawn."""
    return Heat.of(await engine_of(request).heat(key_of(request), first, last, bins))


async def recalls(
    request: Request,
    session_id: str,
    limit: Annotated[int, Query(ge=1, le=1000, description="Recalls to list.")] = 20,
    include: Annotated[str | None, Query(description="`query` adds the first query of each.")] = None,
) -> Response:
    """List the last recalls of a session, newest first."""
    query = "query" in included(request, ("query",))
    found = await engine_of(request).recalls(key_of(request), limit)
    return await respond_json(
        request,
        lambda raw: {"recalls": [raw(to_json(Recall.of(recall, query=query))) for recall in found]},
        settings_of(request).max_answer_bytes,
    )
