"""Bodies as pydantic models: checked for the calls that are not hot, only documented for those that are.

Does not know: the engine, except the records that it takes; answers made of its records are in `views.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from htm_service import records
from htm_service.config import (
    MAX_FOUND,
    MAX_LABELS,
    MAX_NOTE_CHARS,
    MAX_OVERSAMPLE,
    MAX_RANKED,
    MAX_SEARCHED,
    MAX_SESSIONS,
)
from htm_service.errors import clipped
from htm_service.records import DType, OnFull, OpenChunk, RankBy, Role

Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A body: unknown fields are errors, and nothing is guessed from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="null")


# --- requests -------------------------------------------------------------------------------------


class Request(Body):
    """A body of a request. Its first mistake is told, not all: there may be as many as it has bytes."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields:
                    known = ", ".join(sorted(cls.model_fields))
                    raise ValueError(f"unknown field {clipped(name)}; known are {known}")
        return value


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_LABELS:
        raise ValueError(f"there are {len(value)} labels, the limit is {MAX_LABELS}")
    return value


Labels = Annotated[dict[str, str], BeforeValidator(_few)]


class CreateBody(Request):
    """Settings at creation. What is left out is decided by the model or by the server's defaults."""

    dim: int | None = Field(None, description="Width of the tokens; required unless the model fixes it.")
    chunk_size: int | None = Field(None, description="Tokens per chunk; 32 unless the model fixes it.")
    model: str | None = Field(None, description="The model that attends use unless they name another.")
    dtype: DType | None = Field(None, description="In which tokens are kept.")
    open_chunk: OpenChunk | None = Field(None, description="Whether the last, unfilled chunk is visible; `attend`.")
    labels: Labels | None = Field(None, description="For finding sessions again.")
    ttl_s: Number | None = Field(None, description="Seconds without use after which the session is deleted.")
    max_tokens: int | None = Field(None, description="Most tokens the session may hold; no limit if left out.")
    on_full: OnFull | None = Field(
        None, description="An append beyond `max_tokens` is refused, or whole oldest chunks go; `reject`."
    )

    def record(self) -> records.CreateRequest:
        """As the engine takes it."""
        return records.CreateRequest(**self.model_dump(exclude_none=True))


class SessionChange(Request):
    """What is left out or null stays as it is, but for `ttl_s: null`, no limit; `labels` are replaced altogether."""

    labels: Labels | None = Field(None, description="All labels from now on.")
    ttl_s: Number | None = Field(None, description="Idle seconds, or null for no limit.")
    model: str | None = Field(None, description="The session's model from now on.")

    def record(self) -> records.SessionChange:
        """As the engine takes it."""
        clear_ttl = "ttl_s" in self.model_fields_set and self.ttl_s is None
        return records.SessionChange(labels=self.labels, ttl_s=self.ttl_s, clear_ttl=clear_ttl, model=self.model)


class ForkBody(Request):
    """A new session that begins with the first tokens of another one, whose settings it has."""

    id: str | None = Field(None, description="Of the new session; the server makes one if left out.")
    length: int | None = Field(None, description="How many tokens it begins with; all if left out.")
    labels: Labels | None = Field(None, description="All labels of the new session; those of the other if left out.")


class TruncateBody(Request):
    """Until where a session is kept."""

    length: int = Field(description="Its length from now on; 0 forgets all.")
    if_length: int | None = Field(None, description="Truncate only when the session has this length.")


class KeyBody(Request):
    """A key to be made."""

    name: str = Field(description="Unique in its namespace.")
    role: Role = Field(description="`read` attends and searches, `write` changes sessions too, `admin` keys as well.")
    namespace: str | None = Field(None, description="Whose sessions it opens; the caller's, or `default`.")
    expires_in_s: Number | None = Field(None, description="For how many seconds it counts; no limit if left out.")
    requests_per_second: Number | None = Field(None, description="How often it may be used; no limit if left out.")

    def record(self, namespace: str) -> records.KeyWish:
        """As the engine takes it."""
        return records.KeyWish(**{**self.model_dump(), "namespace": namespace})


class QuotaBody(Request):
    """Limits of a namespace; what is left out or null has none."""

    max_sessions: int | None = None
    max_tokens: int | None = Field(None, description="Of all its sessions together, without trimmed ones.")
    max_bytes: int | None = Field(None, description="Of these tokens, as `stored_bytes` counts them.")

    def record(self, namespace: str) -> records.Quota:
        """As the engine takes it."""
        return records.Quota(namespace, **self.model_dump())


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
    episode: int | None = Field(None, description="The episode number of these tokens; it begins no chunk.")
    if_length: int | None = Field(None, description="Append only when the session has this length.")


class AttendBody(Body):
    """Queries, and what they may see."""

    queries: Tensor = Field(description="`[Q, D]`, or `[D]` for one query.")
    model: str | None = Field(None, description="The session's, if left out.")
    top_k: int | None = Field(None, description="Chunks to attend to, 1..256; the model's, if left out.")
    start: int = Field(0, description="First visible position.")
    stop: int | list[int] | None = Field(
        None, description="End of the visible positions, or `[Q]`, one for each query; the length, if left out."
    )
    episodes: list[int] | None = Field(
        None,
        description="Only tokens appended under these episode numbers. Chunks stay those of the session: to attend "
        "to an episode alone, use a session per episode.",
    )
    mask: Mask | None = Field(None, description="`[n]` bool: which tokens are visible.")
    chunk_mask: Mask | None = Field(None, description="`[M]` or `[Q, M]` bool: which chunks are visible.")
    return_: list[Literal["output", "chunks", "tokens", "payloads"]] = Field(
        default=["output"], alias="return", description="What the answer holds."
    )
    max_recalled: int = Field(16, description="Tokens per query that `tokens` and `payloads` list.")
    rank_by: RankBy = Field("weight", description="Order of that list: share of the output, or similarity.")
    timeout_ms: Number | None = Field(None, description="504 when the work has not begun after that.")
    note: str | None = Field(
        None, max_length=MAX_NOTE_CHARS, description="What was asked, in words: kept in the recall."
    )


class SelectBody(Body):
    """Queries in key space, and what they may see: fields as in an attend."""

    queries: Tensor = Field(description="`[Q, D]`, or `[D]` for one query; chunk i's logit is `<query, s_i>`.")
    top_k: int | None = Field(None, description="Chunks to take, 1..256; that of the session's model, if left out.")
    start: int = Field(0, description="First visible position.")
    stop: int | None = Field(None, description="End of the visible positions; the length, if left out.")
    episodes: list[int] | None = Field(None, description="Only tokens appended under these episode numbers.")
    mask: Mask | None = Field(None, description="`[n]` bool: which tokens are visible.")
    chunk_mask: Mask | None = Field(None, description="`[M]` or `[Q, M]` bool: which chunks are visible.")
    return_: list[Literal["chunks", "keys", "tokens"]] = Field(
        default=["chunks", "keys", "tokens"], alias="return", description="What the answer holds."
    )
    timeout_ms: Number | None = Field(None, description="504 when the work has not begun after that.")


class SearchBody(Body):
    """Queries, and what they may see: fields as in an attend."""

    queries: Tensor = Field(description="`[Q, D]`, or `[D]` for one query.")
    n: int = Field(10, description=f"Tokens for each query, 1..{MAX_FOUND}; fewer when fewer are visible.")
    model: str | None = Field(None, description="What scores; the session's, if left out.")
    start: int = Field(0, description="First visible position.")
    stop: int | None = Field(None, description="End of the visible positions; the length, if left out.")
    episodes: list[int] | None = Field(None, description="Only tokens appended under these episode numbers.")
    mask: Mask | None = Field(None, description="`[n]` bool: which tokens are visible.")
    exact: bool = Field(default=False, description="Score every visible token, not only those whose sketches are near.")
    oversample: int | None = Field(
        None, description=f"Tokens that are scored for each one wanted, 1..{MAX_OVERSAMPLE}; the server's, if left out."
    )
    min_score: Number | None = Field(None, description="Only tokens that score at least this.")
    return_: list[Literal["payloads", "embeddings"]] = Field(
        default=["payloads"], alias="return", description="What the answer holds of each token."
    )
    timeout_ms: Number | None = Field(None, description="504 when the work has not begun after that.")


class SearchAllBody(Body):
    """The same over several sessions: those named, or those with these labels and this prefix."""

    queries: Tensor = Field(description="`[Q, D]`, or `[D]` for one query.")
    sessions: list[str] | None = Field(None, description=f"Ids, at most {MAX_SEARCHED}.")
    label: dict[str, str] | None = Field(None, description="Labels that the sessions have, all of them.")
    prefix: str | None = Field(None, description="How their ids begin.")
    n: int = Field(10, description=f"Tokens for each query over all sessions, 1..{MAX_FOUND}.")
    model: str | None = Field(None, description="What scores; each session's, if left out.")
    episodes: list[int] | None = Field(None, description="Only tokens appended under these episode numbers.")
    exact: bool = Field(default=False, description="Score every visible token.")
    oversample: int | None = Field(None, description=f"Tokens scored for each one wanted, 1..{MAX_OVERSAMPLE}.")
    min_score: Number | None = Field(None, description="Only tokens that score at least this.")
    return_: list[Literal["payloads", "embeddings"]] = Field(
        default=["payloads"], alias="return", description="What the answer holds of each token."
    )
    timeout_ms: Number | None = Field(None, description="504 when the work has not begun after that.")


class ExplainBody(AttendBody):
    """One query, and what it may see: as in an attend. `chunks` are always in the answer."""

    return_: list[Literal["output", "chunks", "tokens", "payloads"]] = Field(
        default=["chunks"], alias="return", description="What the answer holds beside the chunks."
    )
    limit: int = Field(100, description=f"Chunks to list, 1..{MAX_RANKED}.")


class StepBody(Body):
    """One step of an agent: attend to the memory as it is, then append."""

    attend: AttendBody
    append: AppendBody


SESSIONS = Field(min_length=1, max_length=MAX_SESSIONS, description="Ids; in append and step none of them twice.")
RowsTensor = list[Row] | list[list[Row]] | Base64Tensor
Stops = int | list[int] | list[list[int] | None]
STOPS = "End of the visible positions: one, `[Q]` for the queries of each, or `[S, Q]` or `[S, 1]`."
RowsMask = list[list[bool]] | list[list[list[bool]]] | Base64Tensor


class BatchAppendFields(Body):
    """Tokens to add at the end of each session."""

    embeddings: RowsTensor = Field(description="`[S, T, D]`, or `[S, D]` for one token each.")
    num_tokens: list[int | None] | None = Field(None, description="`[S]`: how many of the T count; 0: nothing now.")
    payloads: list[list[dict[str, Any] | None] | None] | None = Field(
        None, description="`[S][T]`: per session one object or null per token, or null."
    )
    episode: int | list[int | None] | None = Field(None, description="One, or `[S]`.")
    if_length: list[int | None] | None = Field(None, description="`[S]`: append only where this is the length.")


class BatchAppendBody(BatchAppendFields):
    """Appends to many sessions."""

    sessions: list[str] = SESSIONS


class BatchAttendFields(AttendBody):
    """Queries to each session; what has no sessions in front is the same for all."""

    queries: RowsTensor = Field(description="`[S, Q, D]`, or `[S, D]` for one query each.")  # type: ignore[assignment]
    model: str | list[str | None] | None = Field(  # type: ignore[assignment]
        None, description="One, or `[S]`; the session's, if left out or null."
    )
    start: int | list[int | None] = Field(0, description="First visible position: one, or `[S]`.")  # type: ignore[assignment]
    stop: Stops | None = Field(None, description=STOPS)  # type: ignore[assignment]
    mask: RowsMask | None = Field(None, description="`[S, n]`: all sessions have the length n, or `stop` is n.")  # type: ignore[assignment]
    chunk_mask: RowsMask | None = Field(None, description="`[S, M]` or `[S, Q, M]`.")  # type: ignore[assignment]


class BatchSelectBody(SelectBody):
    """Selects of many sessions; what has no sessions in front is the same for all."""

    sessions: list[str] = SESSIONS
    queries: RowsTensor = Field(description="`[S, Q, D]`, or `[S, D]` for one query each.")  # type: ignore[assignment]
    start: int | list[int | None] = Field(0, description="First visible position: one, or `[S]`.")  # type: ignore[assignment]
    stop: Stops | None = Field(None, description=STOPS)  # type: ignore[assignment]
    mask: RowsMask | None = Field(None, description="`[S, n]`: all sessions have the length n, or `stop` is n.")  # type: ignore[assignment]
    chunk_mask: RowsMask | None = Field(None, description="`[S, M]` or `[S, Q, M]`.")  # type: ignore[assignment]


class BatchTruncateBody(Body):
    """What is forgotten of many sessions; where one is there twice, in this order."""

    sessions: list[str] = SESSIONS
    length: int | list[int] = Field(description="How many tokens are kept: one, or `[S]`; 0 resets a session.")
    if_length: list[int | None] | None = Field(None, description="`[S]`: truncate only where this is the length.")


class BatchAttendBody(BatchAttendFields):
    """Attends to many sessions."""

    sessions: list[str] = SESSIONS


class BatchSearchBody(SearchBody):
    """Searches of many sessions; what has no sessions in front is the same for all."""

    sessions: list[str] = SESSIONS
    queries: RowsTensor = Field(description="`[S, Q, D]`, or `[S, D]` for one query each.")  # type: ignore[assignment]
    model: str | list[str | None] | None = Field(  # type: ignore[assignment]
        None, description="One, or `[S]`; the session's, if left out or null."
    )
    mask: RowsMask | None = Field(None, description="`[S, n]`: all sessions have the length n, or `stop` is n.")  # type: ignore[assignment]


class BatchStepBody(Body):
    """Steps of many sessions: attend to each as it is, then append."""

    sessions: list[str] = SESSIONS
    attend: BatchAttendFields
    append: BatchAppendFields


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


class RankedChunks(Body):
    """The chunks `[n]` that a query sees: those it takes, best first, then the others, best first."""

    index: list[int] | Base64Tensor
    logit: Row | Base64Tensor = Field(description="Of the summary key: what chunks are ranked by.")
    weight: Row | Base64Tensor = Field(description="0 for chunks that are not taken.")


class ExplainAnswer(Body):
    """How a query ranks the chunks it sees, the first `limit` of them; and what `return` asked for."""

    model: str
    model_hash: str
    top_k: int
    num_taken: int = Field(description="The first so many of all are taken.")
    num_visible: int
    chunks: RankedChunks
    output: list[Row] | Base64Tensor | None = None
    recalled: list[list[RecalledToken]] | None = None
    length: int


class SelectedChunks(Body):
    """The chunks that each query takes, `[Q, K]`, best first: -1 and 0 where fewer are visible."""

    index: list[list[int]] | Base64Tensor
    logit: list[Row] | Base64Tensor


class UniqueChunks(Body):
    """The U chunks that the queries take, each once, by ascending index; what `return` asked for."""

    index: list[int] | Base64Tensor
    key: list[Row] | Base64Tensor | None = Field(None, description="`[U, D]`, means of what is visible.")
    tokens: list[list[Row]] | Base64Tensor | None = Field(None, description="`[U, C, D]`, 0 where nothing is visible.")
    visible: list[list[bool]] | Base64Tensor | None = Field(None, description="`[U, C]`, with the tokens.")


class SelectAnswer(Body):
    """What `return` asked for, and the session length this answer saw."""

    chunks: SelectedChunks | None = None
    unique: UniqueChunks | None = None
    length: int


class FoundToken(Body):
    """One found token. `payload` is there when `return` asked for payloads."""

    position: int
    score: float = Field(
        description="With `retrieval` the inner product with the query, else the in-chunk logit, mean over heads."
    )
    chunk: int
    payload: dict[str, Any] | None = None


class FoundInSession(FoundToken):
    """One found token of several sessions'."""

    session: str


class SearchAnswer(Body):
    """Per query what was found, best first, ties to the lower position; and the session length this answer saw."""

    found: list[list[FoundToken]]
    embeddings: list[list[Row]] | Base64Tensor | None = Field(None, description="`[Q, n, D]`, 0 where fewer are found.")
    length: int
    chunk_size: int


class SearchAllAnswer(Body):
    """Per query what was found in all sessions, best first."""

    found: list[list[FoundInSession]]
    embeddings: list[list[Row]] | Base64Tensor | None = Field(None, description="`[Q, n, D]`, 0 where fewer are found.")
    num_sessions: int


class StepAnswer(Body):
    """Both answers."""

    attend: AttendAnswer
    append: AppendAnswer


class ItemError(BaseModel):
    """Why one item failed: what the single call would have said. Some codes add fields, such as `length`."""

    model_config = ConfigDict(extra="allow")

    item: int = Field(description="Which of `sessions`, from 0.")
    status: int
    code: str
    detail: str


class BatchAnswer(Body):
    """What every lock-step answer says; where an item failed, other fields hold 0 or are empty."""

    status: list[int] = Field(description="`[S]`: 200, or what the single call would have answered.")
    errors: list[ItemError]


class AppendsAnswer(Body):
    """The answers of appends, each field `[S]`."""

    start: list[int]
    length: list[int]
    num_chunks: list[int]


class BatchAppendAnswer(BatchAnswer, AppendsAnswer):
    """Appends to many sessions."""


class BatchChunks(Body):
    """The chunks that attends took, `[S, Q, K]`: -1 and 0 where fewer are visible than elsewhere."""

    index: list[list[list[int]]] | Base64Tensor
    weight: list[list[Row]] | Base64Tensor


class AttendsAnswer(Body):
    """What `return` asked for, and the lengths that the answers saw, `[S]`."""

    output: list[list[Row]] | Base64Tensor | None = None
    chunks: BatchChunks | None = None
    recalled: list[list[list[RecalledToken]]] | None = None
    length: list[int]
    model_hash: list[str] = Field(description="`[S]`: of the weights that each was computed with.")


class BatchAttendAnswer(BatchAnswer, AttendsAnswer):
    """Attends to many sessions."""


class BatchSearchAnswer(BatchAnswer):
    """Searches of many sessions, each found by itself; nothing is found where an item failed."""

    found: list[list[list[FoundToken]]]
    embeddings: list[list[list[Row]]] | Base64Tensor | None = Field(None, description="`[S, Q, n, D]`.")
    length: list[int]
    chunk_size: list[int]


class BatchStepAnswer(BatchAnswer):
    """Steps of many sessions."""

    attend: AttendsAnswer
    append: AppendsAnswer


class BatchSelectedChunks(Body):
    """The chunks that queries take, `[S, Q, K]`: -1 and 0 where fewer are visible than elsewhere."""

    index: list[list[list[int]]] | Base64Tensor
    logit: list[list[Row]] | Base64Tensor


class BatchUniqueChunks(Body):
    """The chunks that each session's queries take, each once; -1 and 0 where they take fewer than elsewhere."""

    index: list[list[int]] | Base64Tensor = Field(description="`[S, U]`, ascending, then -1.")
    key: list[list[Row]] | Base64Tensor | None = Field(None, description="`[S, U, D]`.")
    tokens: list[list[list[Row]]] | Base64Tensor | None = Field(None, description="`[S, U, C, D]`.")
    visible: list[list[list[bool]]] | Base64Tensor | None = Field(None, description="`[S, U, C]`, with the tokens.")


class BatchSelectAnswer(BatchAnswer):
    """What `return` asked for, and the lengths that the answers saw, `[S]`."""

    chunks: BatchSelectedChunks | None = None
    unique: BatchUniqueChunks | None = None
    length: list[int]
    chunk_size: list[int] | None = Field(None, description="`[S]`, with the tokens: C is the greatest of them.")


class BatchTruncateAnswer(BatchAnswer):
    """Each session's length after it, `[S]`."""

    length: list[int]
    num_chunks: list[int]


class MemoriesAnswer(Body):
    """Positions `start` to `stop` - 1 of a session."""

    start: int
    stop: int
    length: int
    embeddings: list[Row] | Base64Tensor | None = None
    payloads: list[dict[str, Any] | None] | None = None


class ProblemDocument(BaseModel):
    """An error (RFC 9457). `code` is stable; some codes add fields, such as `length` of a length_conflict."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
