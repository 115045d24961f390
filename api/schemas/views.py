"""Answers made of the engine's records: sessions, chunks, recalls, models, the server.

Does not know: how a call came to its record.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import Field

from api.schemas.bodies import Base64Tensor, Body, Chunks, RecalledToken, Row
from htm_service import records
from htm_service.records import DType, ModelSource, OnFull, OpenChunk, Residency, Role, Tier


def when(seconds: float) -> datetime:
    """A time in an answer: RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def to_json(view: Body) -> bytes:
    """A view as an answer's body, from whatever thread."""
    return view.model_dump_json().encode()


class Bytes(Body):
    """Where a session's bytes are: pages and summary keys on the device, tokens in the store."""

    device: int
    device_keys: int = Field(description="Of `device`, the summary keys.")
    stored: int


class Session(Body):
    """A session under inspection. The counters count since the server started."""

    id: str
    dim: int
    chunk_size: int
    model: str
    dtype: DType
    open_chunk: OpenChunk
    labels: dict[str, str]
    ttl_s: float | None
    max_tokens: int | None
    on_full: OnFull
    first_position: int = Field(description="The tokens before this position were trimmed.")
    length: int
    num_chunks: int
    num_sealed_chunks: int
    residency: Residency
    bytes: Bytes
    created_at: datetime
    updated_at: datetime
    last_used_at: datetime
    num_appends: int
    num_attends: int
    num_queries: int
    damage: str | None = Field(description="What was found wrong with its bytes at rest since the server started.")

    @classmethod
    def of(cls, info: records.SessionInfo) -> Self:
        """The view of a record."""
        return cls(
            bytes=Bytes(
                device=info.device_bytes,
                device_keys=info.device_key_bytes,
                stored=info.stored_bytes,
            ),
            labels=dict(info.labels),
            created_at=when(info.created_at),
            updated_at=when(info.updated_at),
            last_used_at=when(info.last_used_at),
            **{name: getattr(info, name) for name in cls.model_fields.keys() - _SESSION_DERIVED},
        )


_SESSION_DERIVED = {"bytes", "labels", "created_at", "updated_at", "last_used_at"}


class SessionPage(Body):
    """One page of sessions, by id; `cursor` continues it, null at the end."""

    sessions: list[Session]
    cursor: str | None


class Chunk(Body):
    """One chunk: positions `start` to `stop` - 1. The recall counters count since the server started."""

    index: int
    start: int
    stop: int
    sealed: bool
    tier: Tier = Field(description="The fastest one that has its contents; the store, `cold`, has everything.")
    key_norm: float
    num_recalls: int
    mass: float
    last_recalled_at: datetime | None
    key: Row | None = Field(None, description="The summary key, when asked for.")

    @classmethod
    def of(cls, info: records.ChunkInfo) -> Self:
        """The view of a record, without its key: as a text that is part of an answer's."""
        at = info.last_recalled_at
        return cls(
            last_recalled_at=None if at is None else when(at),
            **{name: getattr(info, name) for name in cls.model_fields.keys() - {"last_recalled_at", "key"}},
        )


class ChunkPage(Body):
    """One page of chunks; `cursor` continues it, null at the end."""

    chunks: list[Chunk]
    cursor: str | None


class ChunkDetail(Body):
    """One chunk with the payloads of its tokens, and their embeddings when asked for."""

    chunk: Chunk
    payloads: list[dict[str, Any] | None]
    embeddings: list[Row] | Base64Tensor | None = None


class Recall(Body):
    """The account of one attend: what it took, with weights, for its first queries."""

    at: datetime
    request_id: str
    note: str | None = Field(description="What was asked, as the attend's `note` said it.")
    query: Row | None = Field(None, description="The first query, when asked for, so that it can be explained.")
    episodes: list[int] | None
    is_masked: bool = Field(description="Whether it was asked with masks, which are not kept.")
    model: str
    model_hash: str = Field(description="Of the weights that it was computed with, as in `X-Model-Hash`.")
    length: int
    start: int
    stop: int
    top_k: int
    num_queries: int
    chunks: Chunks
    recalled: list[list[RecalledToken]] | None

    @classmethod
    def of(cls, recall: records.Recall, *, query: bool = False) -> Self:
        """The view of a record."""
        content = content_of(recall)
        if query and recall.query is not None:
            content["query"] = recall.query.tolist()
        return cls(**content)


def content_of(recall: records.Recall) -> dict[str, Any]:
    """The fields of `Recall`, without its query: for events, of which there are too many to be checked one by one."""
    rows = recall.recalled
    return {
        "at": when(recall.at),
        "request_id": recall.request_id,
        "note": recall.note,
        "query": None,
        "episodes": None if recall.episodes is None else list(recall.episodes),
        "is_masked": recall.is_masked,
        "model": recall.model,
        "model_hash": recall.model_hash,
        "length": recall.length,
        "start": recall.start,
        "stop": recall.stop,
        "top_k": recall.top_k,
        "num_queries": recall.num_queries,
        "chunks": {"index": recall.chunk_index.tolist(), "weight": recall.chunk_weight.tolist()},
        "recalled": None if rows is None else [[asdict(item) for item in row] for row in rows],
    }


class Recalls(Body):
    """The last recalls of a session, newest first."""

    recalls: list[Recall]


class Heat(Body):
    """What recalls took since the server started, by runs of chunks: a strip of `b` of them, to be drawn."""

    first: int = Field(description="The first chunk.")
    num_chunks: int
    num_chunks_each: int = Field(description="Chunks per run; the last one may have fewer.")
    num_recalls: list[int] = Field(description="`[b]` how often its chunks were taken.")
    mass: list[float] = Field(description="`[b]` the sum of the weights they got.")
    num_resident: list[int] = Field(description="`[b]` its chunks whose contents are on the device.")
    length: int

    @classmethod
    def of(cls, heat: records.Heat) -> Self:
        """The view of a record."""
        arrays = {"num_recalls", "mass", "num_resident"}
        return cls(
            **{name: getattr(heat, name).tolist() for name in arrays},
            **{name: getattr(heat, name) for name in cls.model_fields.keys() - arrays},
        )


class Truncated(Body):
    """A session after a truncation."""

    length: int
    num_chunks: int


class Deleted(Body):
    """How many sessions were deleted."""

    deleted: int


class ModelConfig(Body):
    """The settings of a model; `dim` and `dim_head` are null when it takes any width."""

    dim: int | None
    heads: int | None
    dim_head: int | None
    top_k: int | None
    chunk_size: int | None
    position_encoding: bool | None
    block: bool | None
    summary_scale: float | None
    attention_scale: float | None


class Model(Body):
    """A model as served. Of a file with an `error` all but the name is null."""

    name: str
    source: ModelSource = Field(description="`store`: it was put; `file`: of the models directory.")
    hash: str | None
    bytes: int | None = Field(description="Of the file that was put.")
    config: ModelConfig | None
    created_at: datetime | None = Field(description="When it was put.")
    num_sessions: int = Field(description="Sessions of the caller's namespace that name it.")
    error: str | None = Field(description="Why it cannot be served; null when it is.")

    @classmethod
    def of(cls, info: records.ModelInfo) -> Self:
        """The view of a record."""
        config = ModelConfig(**{name: getattr(info, name) for name in ModelConfig.model_fields})
        return cls(
            bytes=info.num_bytes,
            config=None if info.heads is None else config,
            created_at=None if info.created_at is None else when(info.created_at),
            **{name: getattr(info, name) for name in ("name", "source", "hash", "num_sessions", "error")},
        )


class Models(Body):
    """All models, by name."""

    models: list[Model]


class Key(Body):
    """A caller's key, without its secret."""

    name: str
    role: Role
    namespace: str
    created_at: datetime
    expires_at: datetime | None
    requests_per_second: float | None
    last_used_at: datetime | None = Field(description="About; of the last seconds only this server's uses count.")

    @classmethod
    def of(cls, key: records.Key) -> Self:
        """The view of a record."""
        times = {name: getattr(key, name) for name in ("created_at", "expires_at", "last_used_at")}
        return cls(
            **{name: None if at is None else when(at) for name, at in times.items()},  # type: ignore[arg-type]
            **{name: getattr(key, name) for name in cls.model_fields.keys() - times.keys()},
        )


class Keys(Body):
    """Callers' keys, by namespace and name."""

    keys: list[Key]


class NewKey(Body):
    """A key that was just made, with its secret."""

    key: str = Field(description="What goes into `Authorization: Bearer KEY`. Nobody is told again.")
    name: str
    role: Role
    namespace: str
    created_at: datetime
    expires_at: datetime | None
    requests_per_second: float | None
    last_used_at: datetime | None


class Quota(Body):
    """What a namespace may hold, null for no limit, and what it holds."""

    namespace: str
    max_sessions: int | None
    max_tokens: int | None
    max_bytes: int | None
    num_sessions: int
    num_tokens: int
    num_bytes: int

    @classmethod
    def of(cls, info: records.QuotaInfo) -> Self:
        """The view of a record."""
        return cls(**{name: getattr(info, name) for name in cls.model_fields})


class Caller(Body):
    """Who asks: what the key may do, the namespace it opens (`*`: any), and the one that this call is about."""

    role: Role
    opens: str
    namespace: str


class Info(Body):
    """The server: version, device and dtype with the reason for both, limits, totals."""

    version: str
    device: str
    device_reason: str
    dtype: DType
    dtype_reason: str
    kernel: str
    kernel_reason: str
    models: list[str]
    limits: dict[str, int | float]
    totals: dict[str, int | float]
    caller: Caller | None = Field(description="Who asks, by the key; null where the server asks for none.")


class Health(Body):
    """A sign of life."""

    status: Literal["alive", "ready"]
