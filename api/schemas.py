"""Bodies as pydantic models: checked and built for the calls that are not hot, documented for those that are.

Does not know: the engine, except the records it is given to show.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from htm_service import records
from htm_service.records import DType, OnFull, OpenChunk, RankBy, Residency

Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A body: unknown fields are errors, and nothing is guessed from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="null")


def when(seconds: float) -> datetime:
    """A time in an answer: RFC 3339 in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


# --- requests -------------------------------------------------------------------------------------


class SessionSettings(Body):
    """Settings at creation. What is left out is decided by the model or by the server's defaults."""

    dim: int | None = Field(None, description="Width of the tokens; required unless the model fixes it.")
    chunk_size: int | None = Field(None, description="Tokens per chunk; 32 unless the model fixes it.")
    model: str | None = Field(None, description="The model that attends use unless they name another.")
    dtype: DType | None = Field(None, description="In which tokens are kept.")
    open_chunk: OpenChunk = Field("attend", description="Whether the last, unfilled chunk is visible.")
    labels: dict[str, str] | None = Field(None, description="For finding sessions again.")
    ttl_s: Number | None = Field(None, description="Seconds without use after which the session is deleted.")
    max_tokens: int | None = Field(None, description="Most tokens the session may hold.")
    on_full: OnFull = Field("reject", description="What an append beyond `max_tokens` does.")

    def record(self) -> records.SessionSettings:
        """As the engine takes it."""
        return records.SessionSettings(**self.model_dump())


class SessionChange(Body):
    """What is left out stays as it is; `labels` are replaced altogether, `ttl_s: null` removes the limit."""

    labels: dict[str, str] = Field(default_factory=dict, description="All labels from now on.")
    ttl_s: Number | None = Field(None, description="Idle seconds, or null for no limit.")
    model: str = Field("", description="The session's model from now on.")

    def record(self) -> records.SessionChange:
        """As the engine takes it."""
        given = self.model_fields_set
        return records.SessionChange(
            labels=self.labels if "labels" in given else None,
            ttl_s=self.ttl_s,
            clear_ttl="ttl_s" in given and self.ttl_s is None,
            model=self.model if "model" in given else None,
        )


class Base64Tensor(Body):
    """A tensor as base64: little-endian, C order."""

    b64: str
    shape: list[int]
    dtype: Literal["float32", "float16", "bfloat16", "bool", "int64"]


Row = list[float]
Tensor = Row | list[Row] | Base64Tensor
Mask = list[bool] | list[list[bool]] | Base64Tensor


class AppendBody(Body):
    """Tokens to add at the end of a session."""

    embeddings: Tensor = Field(description="`[T, D]`, or `[D]` for one token.")
    payloads: list[dict[str, Any] | None] | None = Field(None, description="One object or null per token.")
    episode: int | None = Field(None, description="The episode number of these tokens.")
    if_length: int | None = Field(None, description="Append only when the session has this length.")
    durability: Literal["disk"] = Field("disk", description="Acknowledged means on disk.")


class AttendBody(Body):
    """Queries, and what they may see."""

    queries: Tensor = Field(description="`[Q, D]`, or `[D]` for one query.")
    model: str | None = Field(None, description="The session's, if left out.")
    top_k: int | None = Field(None, description="Chunks to attend to, 1..256; the model's, if left out.")
    start: int = Field(0, description="First visible position.")
    stop: int | None = Field(None, description="End of the visible positions; the length, if left out.")
    episodes: list[int] | None = Field(None, description="Only tokens appended under these episode numbers.")
    mask: Mask | None = Field(None, description="`[n]` bool: which tokens are visible.")
    chunk_mask: Mask | None = Field(None, description="`[M]` or `[Q, M]` bool: which chunks are visible.")
    return_: list[Literal["output", "chunks", "tokens", "payloads"]] = Field(
        default=["output"], alias="return", description="What the answer holds."
    )
    max_recalled: int = Field(16, description="Tokens per query that `tokens` and `payloads` list.")
    rank_by: RankBy = Field("weight", description="Order of that list: share of the output, or similarity.")
    timeout_ms: Number | None = Field(None, description="504 when the work has not begun after that.")


class StepBody(Body):
    """One step of an agent: attend to the memory as it is, then append."""

    attend: AttendBody
    append: AppendBody


# --- answers --------------------------------------------------------------------------------------


class AppendAnswer(Body):
    """The new tokens are the positions from `start` on; the rest is the session's after them."""

    start: int
    length: int
    num_chunks: int


class RecalledToken(Body):
    """One recalled token. `payload` is there when `return` asked for payloads."""

    position: int
    weight: float = Field(description="Its share of the output.")
    score: float = Field(description="Its logit in its chunk, mean over heads.")
    chunk: int
    payload: dict[str, Any] | None = None


class Chunks(Body):
    """The chunks an attend took, `[Q, K]`: -1 and 0 where fewer are visible."""

    index: list[list[int]] | Base64Tensor
    weight: list[Row] | Base64Tensor


class AttendAnswer(Body):
    """What `return` asked for, and the session length this answer saw."""

    output: list[Row] | Base64Tensor | None = None
    chunks: Chunks | None = None
    recalled: list[list[RecalledToken]] | None = None
    length: int


class StepAnswer(Body):
    """Both answers."""

    attend: AttendAnswer
    append: AppendAnswer


class MemoriesAnswer(Body):
    """Positions `start` to `stop` - 1 of a session."""

    start: int
    stop: int
    length: int
    embeddings: list[Row] | Base64Tensor | None = None
    payloads: list[dict[str, Any] | None] | None = None


class Bytes(Body):
    """Where a session's bytes are."""

    device: int
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

    @classmethod
    def of(cls, info: records.SessionInfo) -> Self:
        """The view of a record."""
        return cls(
            bytes=Bytes(device=info.device_bytes, stored=info.stored_bytes),
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
    tier: Residency
    key_norm: float
    num_recalls: int
    mass: float
    last_recalled_at: datetime | None
    key: Row | None = Field(None, description="The summary key, when asked for.")

    @classmethod
    def of(cls, info: records.ChunkInfo) -> Self:
        """The view of a record."""
        at, key = info.last_recalled_at, info.key
        return cls(
            last_recalled_at=None if at is None else when(at),
            key=None if key is None else key.tolist(),
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
    model: str
    length: int
    start: int
    stop: int
    top_k: int
    num_queries: int
    chunks: Chunks
    recalled: list[list[RecalledToken]] | None

    @classmethod
    def of(cls, recall: records.Recall) -> Self:
        """The view of a record."""
        rows = recall.recalled
        derived = {"at", "chunks", "recalled"}
        return cls(
            at=when(recall.at),
            chunks=Chunks(index=recall.chunk_index.tolist(), weight=recall.chunk_weight.tolist()),
            recalled=None if rows is None else [[_recalled(item) for item in row] for row in rows],
            **{name: getattr(recall, name) for name in cls.model_fields.keys() - derived},
        )


def _recalled(item: records.Recalled) -> RecalledToken:
    return RecalledToken(position=item.position, weight=item.weight, score=item.score, chunk=item.chunk)


class Recalls(Body):
    """The last recalls of a session, newest first."""

    recalls: list[Recall]


class Model(Body):
    """A model as served; `dim` is null when it takes any width."""

    name: str
    hash: str
    dim: int | None
    heads: int
    dim_head: int | None
    top_k: int
    chunk_size: int
    position_encoding: bool
    block: bool
    summary_scale: float
    attention_scale: float

    @classmethod
    def of(cls, info: records.ModelInfo) -> Self:
        """The view of a record."""
        return cls(**{name: getattr(info, name) for name in cls.model_fields})


class Models(Body):
    """All models, by name."""

    models: list[Model]


class Info(Body):
    """The server: version, device and dtype with the reason for both, limits, totals."""

    version: str
    device: str
    device_reason: str
    dtype: DType
    dtype_reason: str
    kernel: str
    models: list[str]
    limits: dict[str, int | float]
    totals: dict[str, int | float]


class Health(Body):
    """A sign of life."""

    status: Literal["alive", "ready"]


class ProblemDocument(BaseModel):
    """An error (RFC 9457). `code` is stable; some codes add fields, such as `length` of a length_conflict."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
