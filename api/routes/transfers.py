"""Whole sessions as files, out and in, streamed. Does not know: what is in such a file."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api.errors import shorten
from api.openapi import SESSION_CODES, WRITE_CODES, problems
from api.routes.context import JsonRoute, check_still, engine_of, key_of, settings_of, watch_of
from api.schemas.views import Session
from api.wire import safetensors
from api.wire.body import check_encoding, declared_bytes, stream_body
from htm_service.errors import HTMError, UnsupportedMediaType
from htm_service.transfers.exports import Export

_EXPORT_CODES = (*SESSION_CODES, "length_conflict")
_IMPORT_CODES = (
    *WRITE_CODES,
    "body_too_large",
    "unsupported_media_type",
    "quota_exceeded",
    "session_conflict",
    "model_not_found",
    "invalid_argument",
    "overloaded",
    "unhealthy",
    "draining",
    "internal_error",
)
_FILE = {safetensors.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(prefix="/v1/sessions/{session_id}", tags=["sessions"], route_class=JsonRoute)
    routes.add_api_route(
        "/export",
        export_session,
        methods=["GET"],
        operation_id="export_session",
        response_class=Response,
        responses={
            200: {"description": "The session's file; `Content-Length` is its size.", "content": _FILE},
            **problems(_EXPORT_CODES),
        },
    )
    routes.add_api_route(
        "/import",
        import_session,
        methods=["PUT"],
        operation_id="import_session",
        status_code=201,
        response_model=Session,
        responses=problems(_IMPORT_CODES),
        openapi_extra={"requestBody": {"required": True, "content": _FILE}},
    )
    return routes


async def export_session(request: Request, session_id: str) -> Response:
    """Export a session: one safetensors file with its tokens, episodes, payloads and settings, as it is now."""
    reading = engine_of(request).export_session(key_of(request))
    return Download(await watch_of(request).unless_gone(request, reading), session_id)


async def import_session(request: Request, session_id: str, response: Response) -> Session:
    """Import a session from a file that `export` gave: all of it or nothing."""
    header = request.headers.get("content-type", "")
    if header.partition(";")[0].strip().lower() != safetensors.MEDIA_TYPE:
        found = f"the content type is {shorten(header)}" if header else "there is no content type"
        raise UnsupportedMediaType(f"{found}; use {safetensors.MEDIA_TYPE}")
    check_encoding(request)
    body = _while_known(request, stream_body(request, settings_of(request).max_import_bytes))
    info = await engine_of(request).import_session(key_of(request), body, declared_bytes(request))
    response.headers["Location"] = f"/v1/sessions/{info.id}"
    return Session.of(info)


class Download(StreamingResponse):
    """A session's file. Where it cannot be told to its end the connection is closed before that."""

    def __init__(self, export: Export, name: str) -> None:
        headers = {
            "Content-Length": str(export.num_bytes),
            "Content-Disposition": f'attachment; filename="{name}.safetensors"',
            "Cache-Control": "no-store",
        }
        super().__init__(_unless_closed(export), headers=headers, media_type=safetensors.MEDIA_TYPE)
        self._export = export
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The file; what was kept aside for it is given back with the last byte, or without."""
        try:
            await super().__call__(scope, receive, send)
        except HTMError as error:
            logging.getLogger(__name__).warning("the export of session %s ends early: %s", self._name, error.detail)
            raise ClientDisconnect from None  # the head is sent, so that nothing else can be told
        finally:
            self._export.close()


async def _while_known(request: Request, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for part in parts:
        check_still(request)
        yield part


async def _unless_closed(export: Export) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(export.pieces()) as pieces:
        async for piece in pieces:
            yield piece
