"""Models: list, describe, put, delete. Does not know: what is in a model's file, and when it is swapped."""

from __future__ import annotations

import re

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from api.errors import shorten
from api.openapi import WRITE_CODES, problems
from api.routes.context import JsonRoute, caller_of, check_still, engine_of, settings_of
from api.schemas.views import Model, Models
from api.wire import safetensors
from api.wire.body import check_encoding, read_body
from htm_service.errors import InvalidArgument, UnsupportedMediaType
from htm_service.records import Precondition

_TAGS = re.compile(r'\*|[\s,]*(?:W/)?"[^"]*"(?:\s*,[\s,]*(?:W/)?"[^"]*")*[\s,]*')
"""A list may have empty elements (RFC 9110, 5.6.1)."""
_TAG = re.compile(r'(W/)?"([^"]*)"')

_CODES = ("invalid_argument", "unhealthy", "draining", "internal_error")
_CHANGE_CODES = (*WRITE_CODES, *_CODES, "overloaded", "model_in_use", "model_conflict")
_ETAG = {"ETag": {"description": "The model's hash, in quotes.", "schema": {"type": "string"}}}
_CONDITIONS = [
    {
        "name": name,
        "in": "header",
        "description": meaning,
        "schema": {"type": "string"},
    }
    for name, meaning in (
        ("If-Match", "Only when the model has this hash, in quotes as in `ETag`; `*`: only when there is one."),
        ("If-None-Match", "Only when the model has not this hash; `*`: only when there is none of this name."),
    )
]
_FILE = {
    "required": True,
    "description": "A model file, as `htm-service models convert` makes them: see docs/attention.md.",
    "content": {safetensors.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}


def router() -> APIRouter:
    """The routes of this module."""
    routes = APIRouter(prefix="/v1/models", tags=["models"], route_class=JsonRoute)
    routes.add_api_route("", list_models, methods=["GET"], operation_id="list_models", responses=problems(_CODES))
    routes.add_api_route(
        "/{name}",
        inspect,
        methods=["GET"],
        operation_id="inspect_model",
        responses={200: {"headers": _ETAG}, **problems((*_CODES, "model_not_found"))},
    )
    routes.add_api_route(
        "/{name}",
        put,
        methods=["PUT"],
        operation_id="put_model",
        responses={
            200: {"headers": _ETAG},
            201: {"model": Model, "description": "New.", "headers": _ETAG},
            **problems((*_CHANGE_CODES, "body_too_large", "unsupported_media_type", "quota_exceeded")),
        },
        response_description="Replaced, or there already with the same hash.",
        openapi_extra={"requestBody": _FILE, "parameters": _CONDITIONS},
    )
    routes.add_api_route(
        "/{name}",
        delete,
        methods=["DELETE"],
        operation_id="delete_model",
        status_code=204,
        responses=problems((*_CHANGE_CODES, "model_not_found")),
        openapi_extra={"parameters": _CONDITIONS},
    )
    return routes


async def list_models(request: Request) -> Models:
    """List the models that sessions and attends may name, and those that cannot be served, with their errors."""
    return Models(models=[Model.of(item) for item in await engine_of(request).models(caller_of(request).space)])


async def inspect(request: Request, name: str, response: Response) -> Model:
    """Describe one model."""
    return _tagged(Model.of(await engine_of(request).model(caller_of(request).space, name)), response)


async def put(request: Request, name: str, response: Response) -> Model:
    """Keep a model file under a name: new (201), or in place of the one that has it (200), from the next batch on.

    No attend fails or waits for it, and nothing is encoded again.
    """
    wanted = condition_of(request)
    header = request.headers.get("content-type", "")
    if header.partition(";")[0].strip().lower() != safetensors.MEDIA_TYPE:
        found = f"the content type is {shorten(header)}" if header else "there is no content type"
        raise UnsupportedMediaType(f"{found}; a model is sent as {safetensors.MEDIA_TYPE}")
    check_encoding(request)
    data = await read_body(request, settings_of(request).max_body_bytes, " (--max-body-bytes)")
    check_still(request)
    info, is_new = await engine_of(request).put_model(caller_of(request).space, name, data, wanted)
    if is_new:
        response.status_code = 201
        response.headers["Location"] = f"/v1/models/{name}"
    return _tagged(Model.of(info), response)


async def delete(request: Request, name: str) -> Response:
    """Forget a model that no session names."""
    await engine_of(request).delete_model(caller_of(request).space, name, condition_of(request))
    return Response(status_code=204)


def condition_of(request: Request) -> Precondition:
    """What If-Match and If-None-Match ask for (RFC 9110, 13.1). Raises InvalidArgument for what is none."""
    return Precondition(tags_of(request, "If-Match"), tags_of(request, "If-None-Match"))


def tags_of(request: Request, name: str) -> frozenset[str] | None:
    """The hashes that a header lists, or `*`; None without it. A weak tag is nobody's hash."""
    header = request.headers.get(name)
    if header is None:
        return None
    if _TAGS.fullmatch(header.strip()) is None:
        raise InvalidArgument(f'{name} is {shorten(header)}; it must be a hash in quotes, such as "4f6c1b1d", or *')
    return frozenset({"*"} if header.strip() == "*" else {tag for weak, tag in _TAG.findall(header) if not weak})


def _tagged(model: Model, response: Response) -> Model:
    if model.hash is not None:
        response.headers["ETag"] = f'"{model.hash}"'
    return model
