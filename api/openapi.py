"""openapi.json: FastAPI's own, and the hot calls by hand, because they are plain routes that it does not see.

Every operation lists every status and, as examples, every code that it can answer.
Does not know: how a call is carried out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from api.auth import OPEN, ROLES
from api.errors import MEDIA_TYPE, PROBLEMS, RETRY_STATUSES, document
from api.schemas import bodies
from api.wire import safetensors
from htm_service.config import NAME_PATTERN

REF = "#/components/schemas/{model}"

SESSION_CODES = (
    "session_not_found",
    "session_expired",
    "session_damaged",
    "invalid_argument",
    "overloaded",
    "unhealthy",
    "draining",
    "deadline_exceeded",
    "disk_full",
    "internal_error",
)
"""What every call on a session can answer; those that read it tell, too, what could not be written (`behind.py`)."""
CALLER_CODES = ("unauthenticated", "forbidden", "misdirected_request", "rate_limited", "unhealthy")
"""What every call can answer to one who may not call, but for those that are open to all."""
BODY_CODES = ("malformed_body", "body_too_large", "unsupported_media_type")
"""What every call with a body can answer."""
WRITE_CODES = ("disk_full",)
"""What every call that writes can answer, besides."""

KEYS = (
    "A key has a role, `read`, `write` or `admin` (each call's `x-role` is the least it needs), and a namespace. "
    "Keys of the namespace `*` name one with the header `X-HTM-Namespace`. A server without keys asks for none."
)

SESSION_ID = {
    "name": "session_id",
    "in": "path",
    "required": True,
    "description": f"`{NAME_PATTERN}`",
    "schema": {"type": "string"},
    "example": "agent-7",
}
ENCODING = {
    "name": "encoding",
    "in": "query",
    "description": "How tensors are written in a JSON answer.",
    "schema": {"type": "string", "enum": ["lists", "b64"], "default": "lists"},
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Makes the append safe to repeat for 24 h: 1 to 255 printable ASCII characters.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "example": "agent-7/step-12",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HotCall:
    """What openapi.json says of one hot call."""

    path: str
    method: str
    operation_id: str
    summary: str
    answer: type[BaseModel]
    codes: tuple[str, ...]
    tensors: str
    """The tensors of a binary body and of a binary answer, in words."""
    example: Mapping[str, Any]
    """Of the answer."""
    body: type[BaseModel] | None = None
    body_example: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[Mapping[str, Any], ...] = ()


def problems(codes: Iterable[str]) -> dict[int | str, dict[str, Any]]:
    """The responses of an operation that can answer these codes, by status."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for code in codes:
        problem = PROBLEMS[code]
        response = by_status.setdefault(problem.status, _empty(problem.status))
        example = document(code, problem.example, "4f6c1b1d")
        response["content"][MEDIA_TYPE]["examples"][code] = {"summary": problem.title, "value": example}
    for response in by_status.values():
        response["description"] = ", ".join(response["content"][MEDIA_TYPE]["examples"])
    return by_status


def _empty(status: int) -> dict[str, Any]:
    schema = {"$ref": REF.format(model=bodies.ProblemDocument.__name__)}
    response: dict[str, Any] = {"content": {MEDIA_TYPE: {"schema": schema, "examples": {}}}}
    if status in RETRY_STATUSES:
        response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return response


def operation(call: HotCall) -> dict[str, Any]:
    """The operation object of a hot call."""
    answer: dict[str, Any] = {
        "description": "Done.",
        "headers": {
            "Server-Timing": {
                "description": "`queue`, `compute` and `store` in milliseconds.",
                "schema": {"type": "string"},
            },
            "X-Batch-Size": {
                "description": "Size of the batch this request was in.",
                "schema": {"type": "integer"},
            },
        },
        "content": _content(call.answer, call.example),
    }
    if call.operation_id in ("attend", "explain", "step"):
        answer["headers"]["X-Model-Hash"] = {
            "description": "The hash of the weights that it was computed with.",
            "schema": {"type": "string"},
        }
    if call.method == "get":
        del answer["headers"]
    item: dict[str, Any] = {
        "tags": ["memory"],
        "operationId": call.operation_id,
        "summary": call.summary,
        "description": f"{call.tensors} All other fields are one JSON text under `__metadata__.params`.",
        "parameters": [*([SESSION_ID] if "{session_id}" in call.path else []), *call.parameters, ENCODING],
        "responses": {"200": answer, **{str(status): value for status, value in problems(call.codes).items()}},
    }
    if call.body is not None:
        item["requestBody"] = {"required": True, "content": _content(call.body, call.body_example)}
    return item


def _content(model: type[BaseModel], example: Mapping[str, Any]) -> dict[str, Any]:
    json = {"schema": {"$ref": REF.format(model=model.__name__)}, "example": dict(example)}
    return {
        "application/json": json,
        safetensors.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
    }


def build(app: FastAPI, calls: Iterable[HotCall]) -> dict[str, Any]:
    """The whole document."""
    calls = list(calls)
    result = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for call in calls:
        result["paths"].setdefault(call.path, {})[call.method] = operation(call)
    models: list[type[BaseModel]] = [bodies.ProblemDocument, *(call.answer for call in calls)]
    models += [call.body for call in calls if call.body is not None]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    components = result.setdefault("components", {}).setdefault("schemas", {})
    components.update(definitions["$defs"])
    result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": KEYS}}
    _drop_default_errors(result)
    for path, item in result["paths"].items():
        for one in item.values():
            _add_problems(one, ("invalid_argument",) if path in OPEN else ("invalid_argument", *CALLER_CODES))
            if path not in OPEN:
                one["security"] = [{"key": []}]
                one["x-role"] = ROLES.get(one["operationId"], "admin")
    result["paths"] = dict(sorted(result["paths"].items()))
    return result


def _add_problems(operation: dict[str, Any], codes: Iterable[str]) -> None:
    """What every operation can answer, beside what it documents itself."""
    responses = operation["responses"]
    for status, response in problems(codes).items():
        own = responses.setdefault(str(status), response)
        examples = own["content"][MEDIA_TYPE]["examples"]
        examples.update(response["content"][MEDIA_TYPE]["examples"])
        own["description"] = ", ".join(examples)
    operation["responses"] = dict(sorted(responses.items()))


def _drop_default_errors(result: dict[str, Any]) -> None:
    """FastAPI adds its own 422 to whatever has a parameter; our calls answer problem+json, or never 422."""
    for item in result["paths"].values():
        for operation in item.values():
            invalid = operation["responses"].get("422", {}).get("content", {})
            if "HTTPValidationError" in str(invalid.get("application/json")):
                del operation["responses"]["422"]
    for name in ("HTTPValidationError", "ValidationError"):
        result["components"]["schemas"].pop(name, None)
