"""Bodies of the hot calls, JSON or safetensors, to the engine's records: pure functions of bytes.

Does not know: HTTP. Raises MalformedBody, InvalidArgument, BodyTooLarge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import orjson

from api import safetensors
from api.errors import shorten
from api.fields import Fields
from htm_service.errors import InvalidArgument, MalformedBody
from htm_service.records import AppendRequest, AttendRequest, RankBy

Wire = Literal["json", "safetensors"]
"""How a body is written."""

RETURNS = ("output", "chunks", "tokens", "payloads")
ATTEND_TENSORS = ("queries", "mask", "chunk_mask")
APPEND_TENSORS = ("embeddings",)


@dataclass(frozen=True, slots=True)
class Asked:
    """What an attend's `return` asks for."""

    output: bool
    chunks: bool


def read_fields(body: bytes | bytearray, wire: Wire, max_header_bytes: int) -> Fields:
    """The fields of a body."""
    if wire == "safetensors":
        tensors, params = safetensors.parse(body, max_header_bytes)
        return Fields(params, tensors)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"the body is {shorten(value)}; it must be a JSON object")
    return Fields(value, None)


def attend(fields: Fields, request_id: str) -> tuple[AttendRequest, Asked]:
    """The body of an attend."""
    request, asked = _attend(fields, request_id)
    fields.finish(ATTEND_TENSORS)
    return request, asked


def append(fields: Fields, idempotency_key: str | None) -> AppendRequest:
    """The body of an append."""
    request = _append(fields, idempotency_key)
    fields.finish(APPEND_TENSORS)
    return request


def step(fields: Fields, request_id: str, idempotency_key: str | None) -> tuple[AttendRequest, Asked, AppendRequest]:
    """The body of a step: an attend and an append, each under its name; their tensors side by side."""
    attend_fields, append_fields = fields.inner("attend"), fields.inner("append")
    fields.finish((*ATTEND_TENSORS, *APPEND_TENSORS))
    request, asked = _attend(attend_fields, request_id)
    tokens = _append(append_fields, idempotency_key)
    for part in (attend_fields, append_fields):
        part.finish((*ATTEND_TENSORS, *APPEND_TENSORS))
    return request, asked, tokens


def _attend(fields: Fields, request_id: str) -> tuple[AttendRequest, Asked]:
    returns = fields.texts("return", RETURNS)
    if returns is None:
        returns = {"output"}
    max_recalled = fields.integer("max_recalled")
    timeout_ms = fields.number("timeout_ms")
    request = AttendRequest(
        queries=fields.floats("queries"),
        model=fields.text("model"),
        top_k=fields.integer("top_k"),
        start=fields.integer("start") or 0,
        stop=fields.integer("stop"),
        episodes=fields.integers("episodes"),
        mask=fields.bools("mask"),
        chunk_mask=fields.bools("chunk_mask"),
        tokens=not returns.isdisjoint(("tokens", "payloads")),
        payloads="payloads" in returns,
        max_recalled=16 if max_recalled is None else max_recalled,
        rank_by=cast(RankBy, fields.text("rank_by", ("weight", "score")) or "weight"),
        timeout_s=None if timeout_ms is None else timeout_ms / 1e3,
        request_id=request_id,
    )
    return request, Asked("output" in returns, "chunks" in returns)


def _append(fields: Fields, idempotency_key: str | None) -> AppendRequest:
    durability = fields.text("durability")
    if durability not in (None, "disk"):
        raise InvalidArgument(
            f"durability is {shorten(durability)}; this version has only 'disk': acknowledged means on disk"
        )
    return AppendRequest(
        embeddings=fields.floats("embeddings"),
        payloads=fields.payloads("payloads"),
        episode=fields.integer("episode"),
        if_length=fields.integer("if_length"),
        idempotency_key=idempotency_key,
    )
