"""What the engine takes and answers: requests and answers, as frozen records of numbers, text and numpy arrays.

Shapes: D width, C chunk size, T tokens of one append, n tokens in the session, M chunks, Q queries,
K = min(top_k, visible chunks).
Does not know: HTTP bodies, tensors on a device, storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from storage.base import DEFAULT_NAMESPACE as DEFAULT_NAMESPACE
from storage.base import Quota as Quota
from storage.base import SessionKey as SessionKey

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

DType = Literal["float32", "float16", "bfloat16"]
OpenChunk = Literal["attend", "exclude"]
OnFull = Literal["reject", "evict_oldest"]
RankBy = Literal["weight", "score"]
Residency = Literal["resident", "loading", "cold"]
ALL_NAMESPACES = "*"
"""Where the keys are whose holders name a namespace with each call."""

SHARED_NAMESPACE = "shared"
"""Whose models all may use."""

Role = Literal["read", "write", "admin"]
Tier = Literal["resident", "cold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRequest:
    """The settings of a session; None means that the server decides (from the model, or the default)."""

    dim: int | None = None
    chunk_size: int | None = None
    model: str | None = None
    dtype: DType | None = None
    open_chunk: OpenChunk = "attend"
    labels: Mapping[str, str] | None = None
    ttl_s: float | None = None
    max_tokens: int | None = None
    on_full: OnFull = "reject"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionChange:
    """A PATCH: None leaves a setting as it is; `clear_ttl` removes `ttl_s`."""

    labels: Mapping[str, str] | None = None
    ttl_s: float | None = None
    clear_ttl: bool = False
    model: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo:
    """A session under inspection. Times are seconds since the epoch."""

    id: str
    dim: int
    chunk_size: int
    model: str
    dtype: DType
    open_chunk: OpenChunk
    labels: Mapping[str, str]
    ttl_s: float | None
    max_tokens: int | None
    on_full: OnFull
    first_position: int
    """The session holds the tokens from here to `length`; those before were trimmed."""
    length: int
    num_chunks: int
    """The last chunk's number plus one, like `length` for positions."""
    num_sealed_chunks: int
    residency: Residency
    device_bytes: int
    """Bytes in the arena and of resident summary keys."""
    device_key_bytes: int
    """Of these, the keys'."""
    stored_bytes: int
    """Bytes of the tokens at rest."""
    created_at: float
    updated_at: float
    last_used_at: float
    num_appends: int
    """Since the server started, like the counters below."""
    num_attends: int
    num_queries: int
    damage: str | None
    """What a read since the server's start found wrong with its bytes at rest."""


@dataclass(frozen=True, slots=True)
class SessionPage:
    """One page of a listing; `cursor` continues it, None at the end."""

    sessions: Sequence[SessionInfo]
    cursor: str | None


class Timing(NamedTuple):
    """Where one request's time went, in seconds, and the size of the batch it was in (queries)."""

    queue_s: float = 0.0
    compute_s: float = 0.0
    store_s: float = 0.0
    batch_size: int = 0

    def plus(self, other: Timing) -> Timing:
        """The times of both; the batch is this one's."""
        queue_s, compute_s = self.queue_s + other.queue_s, self.compute_s + other.compute_s
        return Timing(queue_s, compute_s, self.store_s + other.store_s, self.batch_size)


class AppendRequest(NamedTuple):
    """Tokens to add. `embeddings` [T, D] or [D]; `payloads` one JSON object as text per token, or None."""

    embeddings: Floats
    payloads: Sequence[bytes | None] | None = None
    episode: int | None = None
    if_length: int | None = None
    idempotency_key: str | None = None


class AppendResult(NamedTuple):
    """The new tokens are positions start .. start+T-1; `length` and `num_chunks` are the session's after it.

    With `is_repeated` it was made before, under the same idempotency key, and this is what it was answered then.
    """

    start: int
    length: int
    num_chunks: int
    timing: Timing = Timing()
    is_repeated: bool = False


class TruncateRequest(NamedTuple):
    """Forget the tokens from position `length` on, if the session's length is `if_length`, where that is given."""

    length: int
    if_length: int | None = None


class TruncateResult(NamedTuple):
    """The session after a truncation."""

    length: int
    num_chunks: int
    timing: Timing = Timing()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendRequest:
    """HTM attention queries; see docs/api.md for the meaning and the defaults of each field.

    `queries` [Q, D] or [D]; `mask` [n], n being `stop` or, without it, the session's length;
    `chunk_mask` [M] or [Q, M] for the M chunks of those n tokens. `stops` [Q], each at most `stop`: where the visible
    range stops for each query.
    """

    queries: Floats
    model: str | None = None
    top_k: int | None = None
    start: int = 0
    stop: int | None = None
    stops: Sequence[int] | None = None
    episodes: Sequence[int] | None = None
    mask: Bools | None = None
    chunk_mask: Bools | None = None
    tokens: bool = False
    """Whether the answer lists the recalled tokens."""
    payloads: bool = False
    """Whether that list carries payloads; implies `tokens`."""
    max_recalled: int = 16
    rank_by: RankBy = "weight"
    timeout_s: float | None = None
    note: str | None = None
    """What was asked, in words: kept in the recall."""
    request_id: str = ""

    @property
    def is_masked(self) -> bool:
        """Whether it says token by token, or chunk by chunk, what it sees."""
        return self.mask is not None or self.chunk_mask is not None


@dataclass(frozen=True, slots=True)
class Recalled:
    """One recalled token of one query; `payload` is JSON text as it was appended."""

    position: int
    weight: float
    score: float
    chunk: int
    payload: bytes | None = None


RECALLED_BYTES = 100
"""About what a recalled token takes in an answer, without its payload."""


def recalled_bytes(rows: Sequence[Sequence[Recalled]] | None) -> int:
    """About how many bytes recalled tokens take in an answer: each payload as often as it is there."""
    return sum(RECALLED_BYTES + len(token.payload or b"") for row in rows or () for token in row)


@dataclass(frozen=True, slots=True)
class Ranking:
    """How one query ranks the chunks it sees: those it takes, best first, then the others, best first.

    `index` [n] chunks, `logit` [n] of their summary keys, `weight` [n], 0 for those not taken. `num_taken` and
    `num_visible` count them all, whether they are among these n or not.
    """

    index: Ints
    logit: Floats
    weight: Floats
    num_taken: int
    num_visible: int


class AttendResult(NamedTuple):
    """`output` [Q, D]; `chunk_index` and `chunk_weight` [Q, K], -1 and 0 where fewer chunks are visible;
    `recalled` per query, in rank order, or None when not asked for; `length` the session had; `ranking` where an
    explanation was asked for; `model_hash` and `top_k`, of the weights that it was computed with; `num_truncated`, how
    often the session had been truncated.
    """

    output: Floats
    chunk_index: Ints
    chunk_weight: Floats
    recalled: Sequence[Sequence[Recalled]] | None
    length: int
    timing: Timing = Timing()
    ranking: Ranking | None = None
    model_hash: str = ""
    top_k: int = 0
    num_truncated: int = 0


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """The tokens that score best against `queries` [Q, D] or [D]; see docs/api.md. `mask` is as in AttendRequest."""

    queries: Floats
    num_wanted: int = 10
    """n: tokens for each query."""
    model: str | None = None
    start: int = 0
    stop: int | None = None
    episodes: Sequence[int] | None = None
    mask: Bools | None = None
    exact: bool = False
    """Whether every visible token is scored."""
    oversample: int | None = None
    """Tokens scored for each that is wanted, where sketches say which; None: the server's."""
    min_score: float | None = None
    payloads: bool = True
    """Whether the answer has the payloads of what was found, and the `embeddings`."""
    embeddings: bool = False
    timeout_s: float | None = None
    request_id: str = ""


class SearchResult(NamedTuple):
    """What queries found, best first, ties to the lower position: `position` [Q, n] int64, -1 where fewer are visible,
    and `score` [Q, n], 0 there; `payloads` by position and `embeddings` [Q, n, D], 0 there, when asked for; `length`
    and `chunk_size` of the session.
    """

    position: Ints
    score: Floats
    length: int
    chunk_size: int
    payloads: Mapping[int, bytes] | None = None
    embeddings: Floats | None = None
    timing: Timing = Timing()
    num_truncated: int = 0
    """How often the session had been truncated."""


FOUND_BYTES = 80
"""About what a found token takes in an answer, without its payload."""


class SearchAllResult(NamedTuple):
    """The same over several sessions: of each, `sessions` [S] being their ids, what was found there, and which of it
    are the best: per query the session and the place among its results, best first.
    """

    sessions: Sequence[str]
    results: Sequence[SearchResult]
    best: Sequence[Sequence[tuple[int, int]]]
    timing: Timing = Timing()


@dataclass(frozen=True, slots=True)
class Taken:
    """The chunks that the queries of a select take, each once: `index` [U], ascending; `key` [U, D] of what is visible;
    `tokens` [U, C, D] in float32, 0 where nothing is visible, and `visible` [U, C]; each when asked for.
    """

    index: Ints
    key: Floats | None
    tokens: Floats | None
    visible: Bools | None

    @property
    def num_bytes(self) -> int:
        """Of all its arrays."""
        arrays = (self.index, self.key, self.tokens, self.visible)
        return sum(array.nbytes for array in arrays if array is not None)


class SelectResult(NamedTuple):
    """`chunk_index` and `chunk_logit` [Q, K], best first, -1 and 0 where fewer chunks are visible; what these hold in
    `taken`, when asked for; `length` the session had.
    """

    chunk_index: Ints
    chunk_logit: Floats
    taken: Taken | None
    length: int
    timing: Timing = Timing()
    num_truncated: int = 0
    """How often the session had been truncated."""


class StepRequest(NamedTuple):
    """An attend, and then an append."""

    attend: AttendRequest
    append: AppendRequest


class StepResult(NamedTuple):
    """What they answered."""

    attended: AttendResult
    appended: AppendResult


class Explanation(NamedTuple):
    """Why one query takes the chunks it takes, with the name of the model that it was answered with."""

    attended: AttendResult
    ranking: Ranking
    model: str


@dataclass(frozen=True, slots=True)
class Memories:
    """Tokens start .. stop-1 read back: `embeddings` [stop-start, D] and `payloads`, each when asked for."""

    start: int
    stop: int
    length: int
    embeddings: Floats | None
    payloads: Sequence[bytes | None] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInfo:
    """One chunk: tokens start .. stop-1. `key` [D] and `key_norm` are those of its summary key.

    The recall counters count since the server started: attends that took the chunk, per query; the sum of
    its chunk weights; the time of the last one.
    """

    index: int
    start: int
    stop: int
    sealed: bool
    tier: Tier
    """Where its contents are: on the device, or only in the store."""
    key_norm: float
    num_recalls: int
    mass: float
    last_recalled_at: float | None
    key: Floats | None = None


@dataclass(frozen=True, slots=True)
class ChunkPage:
    """One page of a session's chunks; `cursor` continues it, None at the end."""

    chunks: Sequence[ChunkInfo]
    cursor: str | None


@dataclass(frozen=True, slots=True)
class ChunkDetail:
    """One chunk with the payloads of its tokens, and its `embeddings` [stop-start, D] when asked for."""

    chunk: ChunkInfo
    payloads: Sequence[bytes | None]
    embeddings: Floats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """What recalls took of runs of `num_chunks_each` chunks, the first of which begins with chunk `first`; b runs.

    Of each run [b]: how often its chunks were taken, the mass they received, and how many are on the device. `length`
    is the session's.
    """

    first: int
    num_chunks: int
    num_chunks_each: int
    num_recalls: Ints
    mass: npt.NDArray[np.float64]
    num_resident: Ints
    length: int


class Recall(NamedTuple):
    """The account of one attend, kept in the session's bounded ring: what was asked and what it took, with weights.

    `chunk_index` and `chunk_weight` [Q', K] for the first Q' queries, kept as bytes: arrays of eight numbers are more
    memory around than in them. `recalled` for the same ones when the request listed its tokens, without payloads.
    `query` [D] is the first one, of the last recalls, so that it can be explained later; `is_masked` says that it was
    asked with masks, which are not kept.
    """

    at: float
    request_id: str
    note: str | None
    query: Floats | None
    episodes: Sequence[int] | None
    is_masked: bool
    model: str
    model_hash: str
    """Of the weights that it was computed with."""
    length: int
    start: int
    stop: int
    top_k: int
    num_queries: int
    num_rows: int
    index_bytes: bytes
    weight_bytes: bytes
    recalled: Sequence[Sequence[Recalled]] | None

    @property
    def chunk_index(self) -> Ints:
        """[Q', K], -1 where fewer chunks were visible."""
        flat = np.frombuffer(self.index_bytes, np.int64)
        return flat.reshape(self.num_rows, len(flat) // self.num_rows)

    @property
    def chunk_weight(self) -> Floats:
        """[Q', K], 0 where fewer chunks were visible."""
        flat = np.frombuffer(self.weight_bytes, np.float32)
        return flat.reshape(self.num_rows, len(flat) // self.num_rows)


EventKind = Literal["recall", "append", "truncate", "session"]
Change = Literal["created", "forked", "updated", "deleted"]


class Event(NamedTuple):
    """What happened to a session: a recall with its account, an append, a truncation, or a change of the session
    itself.
    """

    kind: EventKind
    key: SessionKey
    at: float
    what: Recall | AppendResult | TruncateResult | Change


ModelSource = Literal["built-in", "file", "store"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as served. `dim` is None when it takes any width. `num_bytes` and `created_at` are of one that was put.

    One that cannot be served has an `error`, which says why, and of a file nothing else but its name.
    """

    name: str
    source: ModelSource = "file"
    hash: str | None = None
    dim: int | None = None
    heads: int | None = None
    dim_head: int | None = None
    top_k: int | None = None
    chunk_size: int | None = None
    position_encoding: bool | None = None
    block: bool | None = None
    summary_scale: float | None = None
    attention_scale: float | None = None
    num_bytes: int | None = None
    created_at: float | None = None
    num_sessions: int = 0
    """Of the namespace that asks, those that name it."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Precondition:
    """What the hash of a model must be, or must not be, for it to be changed; `*` stands for any."""

    match: frozenset[str] | None = None
    none_match: frozenset[str] | None = None

    def holds(self, current: str | None) -> bool:
        """Whether it does for the hash of the model as it is, None where there is none (RFC 9110, 13.1)."""
        has = {current, "*"} if current is not None else set()
        return (self.match is None or not has.isdisjoint(self.match)) and (
            self.none_match is None or has.isdisjoint(self.none_match)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A caller's key, without its secret. Times are seconds since the epoch."""

    name: str
    role: Role
    namespace: str
    created_at: float
    expires_at: float | None
    requests_per_second: float | None
    last_used_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaInfo:
    """What a namespace may hold, None for no limit, and what it holds."""

    namespace: str
    max_sessions: int | None
    max_tokens: int | None
    max_bytes: int | None
    num_sessions: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyWish:
    """A key to be made. `expires_in_s` and `requests_per_second` None mean no limit."""

    name: str
    role: Role
    namespace: str
    expires_in_s: float | None = None
    requests_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What GET /v1/info tells: version, device, limits, totals."""

    version: str
    device: str
    device_reason: str
    dtype: DType
    dtype_reason: str
    kernel: str
    kernel_reason: str
    models: Sequence[str]
    """The names of those that are served."""
    limits: Mapping[str, float]
    totals: Mapping[str, float] = field(default_factory=dict)
