"""What a request must be before anything is done: ids, settings, shapes, ranges, finiteness.

Every function raises InvalidArgument with the value and the limit, or returns the checked value.
Does not know what is stored, except what it is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from htm_service import config as limits
from htm_service.attention.model import Model
from htm_service.dtypes import TORCH_DTYPES
from htm_service.errors import InvalidArgument, quoted
from htm_service.records import (
    AppendRequest,
    AttendRequest,
    CreateRequest,
    DType,
    Floats,
    Quota,
    SearchRequest,
    SessionKey,
    TruncateRequest,
)
from htm_service.session_settings import SessionSettings

ID = re.compile(limits.NAME_PATTERN)


FEW_NUMBERS = 4096
"""So many are looked at by pieces of LOOKED_AT_ONCE: for more, numpy lets another thread have the interpreter, and to
get it back takes longer than all of it.
"""
LOOKED_AT_ONCE = 500


def check_id(session_id: str) -> str:
    """A session id: 1 to 128 of letters, digits and `. _ ~ -`, and not a path step (`.` or `..`)."""
    if not ID.fullmatch(session_id) or session_id in {".", ".."}:
        raise InvalidArgument(f"session id is {quoted(session_id)}, it must match {ID.pattern}, and not be '.' or '..'")
    return session_id


def check_namespace(namespace: str) -> str:
    """A namespace's name, of the same characters."""
    if not ID.fullmatch(namespace):
        raise InvalidArgument(f"the namespace is {quoted(namespace)}, it must match {ID.pattern}")
    return namespace


def check_key(key: SessionKey) -> SessionKey:
    """A session's name."""
    check_namespace(key.namespace)
    check_id(key.id)
    return key


def check_quota(quota: Quota) -> None:
    """Limits of a namespace: whole numbers from 0 on."""
    check_namespace(quota.namespace)
    for name in ("max_sessions", "max_tokens", "max_bytes"):
        if (limit := getattr(quota, name)) is not None:
            check_range(name, limit, 0, 2**53)


def check_prefix(prefix: str) -> str:
    """The beginning of session ids: at most 128 of their characters."""
    if prefix and not ID.fullmatch(prefix):
        raise InvalidArgument(f"prefix is {quoted(prefix)}, it must match [A-Za-z0-9._~-]{{0,128}}, as session ids do")
    return prefix


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels: at most MAX_LABELS, keys and values at most MAX_LABEL_CHARS characters."""
    if len(labels) > limits.MAX_LABELS:
        raise InvalidArgument(f"there are {len(labels)} labels, the limit is {limits.MAX_LABELS}")
    for key, value in labels.items():
        if not key or max(len(key), len(value)) > limits.MAX_LABEL_CHARS:
            raise InvalidArgument(
                f"label {quoted(key)} has a key of {len(key)} and a value of {len(value)} characters; "
                f"the limits are 1 to {limits.MAX_LABEL_CHARS} and 0 to {limits.MAX_LABEL_CHARS}"
            )
    return dict(labels)


def check_ttl(ttl_s: float | None) -> float | None:
    """Idle seconds: a positive finite number, or None for ever."""
    if ttl_s is not None and not (math.isfinite(ttl_s) and ttl_s > 0):
        raise InvalidArgument(f"ttl_s is {ttl_s}, it must be a finite number above 0")
    return ttl_s


def check_range(name: str, value: int, low: int, high: int) -> int:
    """An integer between `low` and `high`, both included."""
    if not low <= value <= high:
        raise InvalidArgument(f"{name} is {value}, it must be {low} to {high}")
    return value


def check_truncate(request: TruncateRequest) -> TruncateRequest:
    """Lengths that a session may have."""
    check_range("length", request.length, 0, 2**53)
    check_range("if_length", request.if_length or 0, 0, 2**53)
    return request


def resolve_settings(wish: CreateRequest, model_name: str, model: Model, dtype: DType) -> SessionSettings:
    """The settings of a new session: what was asked for, else the model's, else the default."""
    dim = wish.dim if wish.dim is not None else model.dim
    if dim is None:
        raise InvalidArgument(f"dim is missing, and model {model_name!r} takes any width")
    check_range("dim", dim, 1, limits.MAX_DIM)
    check_model_dim(model_name, model, dim)
    chunk_size = wish.chunk_size if wish.chunk_size is not None else model.config.chunk_size
    if wish.dtype is not None and wish.dtype not in TORCH_DTYPES:
        raise InvalidArgument(f"dtype is {quoted(wish.dtype)}, it must be one of {', '.join(TORCH_DTYPES)}")
    if wish.on_full not in {"reject", "evict_oldest"}:
        raise InvalidArgument(f"on_full is {quoted(wish.on_full)}, it must be 'reject' or 'evict_oldest'")
    if wish.max_tokens is not None:
        check_range("max_tokens", wish.max_tokens, chunk_size if wish.on_full == "evict_oldest" else 1, 2**53)
    elif wish.on_full == "evict_oldest":
        raise InvalidArgument("on_full is 'evict_oldest', and max_tokens is missing")
    return SessionSettings(
        dim=dim,
        chunk_size=check_range("chunk_size", chunk_size, 1, limits.MAX_CHUNK_SIZE),
        model=model_name,
        dtype=wish.dtype or dtype,
        open_chunk=wish.open_chunk,
        labels=check_labels(wish.labels or {}),
        ttl_s=check_ttl(wish.ttl_s),
        on_full=wish.on_full,
        max_tokens=wish.max_tokens,
    )


def check_model_dim(name: str, model: Model, dim: int) -> None:
    """A model of fixed width serves sessions of that width only."""
    if model.dim is not None and model.dim != dim:
        raise InvalidArgument(f"model {name!r} has width {model.dim}, the session has {dim}")


def check_append(request: AppendRequest, dim: int) -> AppendRequest:
    """An append with `embeddings` as [T, D], T at least 1."""
    embeddings = _check_matrix("embeddings", request.embeddings, dim)
    num_tokens = len(embeddings)
    if request.payloads is not None and len(request.payloads) != num_tokens:
        raise InvalidArgument(f"payloads has {len(request.payloads)} entries, embeddings has {num_tokens} tokens")
    if request.episode is not None:
        check_range("episode", request.episode, -(2**53), 2**53)
    if request.if_length is not None:
        check_range("if_length", request.if_length, 0, 2**53)
    return request if embeddings is request.embeddings else request._replace(embeddings=embeddings)


def check_batch_append(request: AppendRequest, dim: int) -> AppendRequest:
    """One append of several, which may have no tokens."""
    if request.embeddings.ndim == 2 and not len(request.embeddings):
        check_append(request._replace(embeddings=np.zeros((1, dim), np.float32), payloads=None), dim)
        return request
    return check_append(request, dim)


def check_attend(request: AttendRequest, dim: int) -> AttendRequest:
    """An attend with `queries` as [Q, D]; shapes that depend on the session's length are checked with it."""
    queries = _check_matrix("queries", request.queries, dim)
    check_range("the number of queries", len(queries), 1, limits.MAX_QUERIES)
    chunk_mask = request.chunk_mask
    if chunk_mask is not None and chunk_mask.ndim == 2 and len(chunk_mask) != len(queries):
        raise InvalidArgument(
            f"chunk_mask has shape {list(chunk_mask.shape)}, it must have one row for each of {len(queries)} queries"
        )
    if request.top_k is not None:
        check_range("top_k", request.top_k, 1, limits.MAX_TOP_K)
    check_range("start", request.start, 0, 2**53)
    if request.stop is not None:
        check_range("stop", request.stop, 0, 2**53)
    if request.stops is not None:
        if len(request.stops) != len(queries):
            raise InvalidArgument(f"stop has {len(request.stops)} values, there are {len(queries)} queries")
        check_range("the lowest stop", min(request.stops), 0, 2**53)
    check_range("max_recalled", request.max_recalled, 1, limits.MAX_RECALLED)
    if request.rank_by not in {"weight", "score"}:
        raise InvalidArgument(f"rank_by is {quoted(request.rank_by)}, it must be 'weight' or 'score'")
    if request.timeout_s is not None and not 0 < request.timeout_s <= 3600:
        raise InvalidArgument(f"timeout_ms is {request.timeout_s * 1e3:g}, it must be above 0 and at most 3600000")
    if request.note is not None and len(request.note) > limits.MAX_NOTE_CHARS:
        raise InvalidArgument(f"note has {len(request.note)} characters, the limit is {limits.MAX_NOTE_CHARS}")
    if queries is request.queries and request.tokens >= request.payloads:
        return request
    return replace(request, queries=queries, tokens=True if request.payloads else request.tokens)


def check_search(request: SearchRequest, dim: int, session: str | None = None) -> SearchRequest:
    """A search with `queries` as [Q, D], of one session or of one among several, which an error then names."""
    try:
        queries = _check_matrix("queries", request.queries, dim)
    except InvalidArgument as error:
        raise error if session is None else InvalidArgument(f"session {session!r}: {error}") from None
    check_range("the number of queries", len(queries), 1, limits.MAX_QUERIES)
    check_range("n", request.num_wanted, 1, limits.MAX_FOUND)
    check_range("start", request.start, 0, 2**53)
    if request.stop is not None:
        check_range("stop", request.stop, 0, 2**53)
    if request.oversample is not None:
        check_range("oversample", request.oversample, 1, limits.MAX_OVERSAMPLE)
    if request.min_score is not None and not math.isfinite(request.min_score):
        raise InvalidArgument(f"min_score is {request.min_score}, it must be a finite number")
    if request.timeout_s is not None and not 0 < request.timeout_s <= 3600:
        raise InvalidArgument(f"timeout_ms is {request.timeout_s * 1e3:g}, it must be above 0 and at most 3600000")
    return request if queries is request.queries else replace(request, queries=queries)


def check_explain(request: AttendRequest, limit: int, dim: int) -> AttendRequest:
    """An explanation of `limit` chunks: as an attend of one query."""
    request = check_attend(request, dim)
    check_range("the number of queries", len(request.queries), 1, 1)
    check_range("limit", limit, 1, limits.MAX_RANKED)
    return request


def _are_finite(numbers: Floats) -> bool:
    """Whether all of numbers [n] are finite."""
    if len(numbers) > FEW_NUMBERS:
        return bool(np.isfinite(numbers).all())
    pieces = (numbers[first : first + LOOKED_AT_ONCE] for first in range(0, len(numbers), LOOKED_AT_ONCE))
    return not any(b"\0" in np.isfinite(piece).tobytes() for piece in pieces)  # a third of the time that `all` takes


def _check_matrix(name: str, array: Floats, dim: int) -> Floats:
    matrix = array[None] if array.ndim == 1 else array
    if matrix.ndim != 2 or matrix.shape[1] != dim:
        raise InvalidArgument(f"{name} has shape {list(array.shape)}, it must be [{dim}] or [n, {dim}]")
    if not len(matrix):
        raise InvalidArgument(f"{name} has shape {list(array.shape)}, it must hold at least one row")
    if matrix.dtype != np.float32:
        raise InvalidArgument(f"{name} has dtype {matrix.dtype}, the engine takes float32")
    if not _are_finite(matrix.ravel()):
        at = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise InvalidArgument(f"{name}{list(at)} is {array[at]}, it must be a finite float32")
    return matrix
