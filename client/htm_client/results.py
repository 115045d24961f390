"""What calls answer, as frozen records. Shapes: T tokens, D width, Q queries, K selected chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from htm_client.errors import ItemError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def _no_ints() -> Ints:
    return np.zeros(0, np.int64)


class _FromJSON:
    """Built from a JSON object; fields of later servers are ignored."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Self:
        """The record of a JSON object."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionInfo(_FromJSON):
    """A session under inspection; times are RFC 3339 text, `bytes` by tier."""

    id: str
    dim: int
    chunk_size: int
    model: str
    dtype: str
    open_chunk: str
    labels: Mapping[str, str]
    ttl_s: float | None
    max_tokens: int | None
    on_full: str
    length: int
    num_chunks: int
    num_sealed_chunks: int
    residency: str
    bytes: Mapping[str, int]
    created_at: str
    updated_at: str
    last_used_at: str
    num_appends: int
    num_attends: int
    num_queries: int
    first_position: int = 0
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class Appended(_FromJSON):
    """The new tokens are positions `start` on; `length` and `num_chunks` are the session's after them."""

    start: int
    length: int
    num_chunks: int


@dataclass(frozen=True, slots=True)
class Truncated(_FromJSON):
    """A session's length and number of chunks after a truncation."""

    length: int
    num_chunks: int


@dataclass(frozen=True, slots=True)
class Memories:
    """Tokens `start` .. `stop`-1: `embeddings` [stop-start, D] and payloads, each when asked for."""

    start: int
    stop: int
    length: int
    embeddings: Floats | None
    payloads: Sequence[Mapping[str, Any] | None] | None


@dataclass(frozen=True, slots=True)
class Recalled(_FromJSON):
    """One recalled token: `weight` is its share of the output, `score` its similarity."""

    position: int
    weight: float
    score: float
    chunk: int
    payload: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Attended:
    """`output` [Q, D]; `chunk_index`, `chunk_weight` [Q, K]; `recalled` per query; each when asked for."""

    output: Floats | None
    chunk_index: Ints | None
    chunk_weight: Floats | None
    recalled: Sequence[Sequence[Recalled]] | None
    length: int
    model_hash: str
    """Of the weights that it was computed with."""
    timing_ms: Mapping[str, float]
    """Where the server's time went: `queue`, `compute`, `store`."""
    batch_size: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Explained:
    """How one query ranks the chunks it sees, [n]: the `num_taken` that it takes, best first, then the others.

    `chunk_weight` is 0 for those not taken; `output` and `recalled` are there when asked for.
    """

    chunk_index: Ints
    chunk_logit: Floats
    chunk_weight: Floats
    num_taken: int
    num_visible: int
    model: str
    model_hash: str
    top_k: int
    output: Floats | None
    recalled: Sequence[Recalled] | None
    length: int


@dataclass(frozen=True, slots=True)
class Selected:
    """`chunk_index`, `chunk_logit` [Q, K], best first, -1 and 0 where fewer chunks are visible.

    Of the U chunks taken, each once: `unique_index` [U], ascending, `unique_key` [U, D], `unique_tokens` [U, C, D],
    0 where nothing is visible, `unique_visible` [U, C]. Each when asked for.
    """

    chunk_index: Ints | None
    chunk_logit: Floats | None
    unique_index: Ints | None
    unique_key: Floats | None
    unique_tokens: Floats | None
    unique_visible: Bools | None
    length: int


@dataclass(frozen=True, slots=True)
class Found(_FromJSON):
    """One found token; `embedding` [D] when asked for, `session` when several were searched."""

    position: int
    score: float
    chunk: int
    payload: Mapping[str, Any] | None = None
    embedding: Floats | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Stepped:
    """The two answers of a step."""

    attended: Attended
    appended: Appended


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAppended:
    """Of appends to S sessions, [S] each; 0 where an item failed. `status` is 200, or what the single call answers."""

    start: Ints
    length: Ints
    num_chunks: Ints
    status: Ints = field(default_factory=_no_ints)
    errors: Sequence[ItemError] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAttended:
    """Of attends to S sessions: `output` [S, Q, D], `chunk_index` and `chunk_weight` [S, Q, K], `recalled` per session
    and query, each when asked for; `length` [S]; `model_hash` [S]. 0, or empty, where an item failed.
    """

    output: Floats | None
    chunk_index: Ints | None
    chunk_weight: Floats | None
    recalled: Sequence[Sequence[Sequence[Recalled]]] | None
    length: Ints
    model_hash: Sequence[str]
    """Of the weights that each was computed with."""
    timing_ms: Mapping[str, float]
    batch_size: int
    request_id: str
    status: Ints = field(default_factory=_no_ints)
    errors: Sequence[ItemError] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFound:
    """Of searches of S sessions: what was `found`, per session and query, best first; `length` [S]. Nothing, and 0,
    where an item failed.
    """

    found: Sequence[Sequence[Sequence[Found]]]
    length: Ints
    timing_ms: Mapping[str, float]
    batch_size: int
    request_id: str
    status: Ints = field(default_factory=_no_ints)
    errors: Sequence[ItemError] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSelected:
    """Of selects of S sessions: `chunk_index`, `chunk_logit` [S, Q, K]; of the chunks that each takes `unique_index`
    [S, U], -1 where it takes fewer than another, `unique_key` [S, U, D], `unique_tokens` [S, U, C, D], `unique_visible`
    [S, U, C], each when asked for; `length` [S].
    """

    chunk_index: Ints | None
    chunk_logit: Floats | None
    unique_index: Ints | None
    unique_key: Floats | None
    unique_tokens: Floats | None
    unique_visible: Bools | None
    chunk_size: Ints | None
    """[S] with the tokens, of which a session with smaller chunks than another has fewer."""
    length: Ints
    status: Ints = field(default_factory=_no_ints)
    errors: Sequence[ItemError] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTruncated:
    """Of truncations of S sessions, [S] each; 0 where an item failed."""

    length: Ints
    num_chunks: Ints
    status: Ints = field(default_factory=_no_ints)
    errors: Sequence[ItemError] = ()


@dataclass(frozen=True, slots=True)
class BatchStepped:
    """The two answers of the steps of S sessions; `status` [S] and `errors` are of both."""

    attended: BatchAttended
    appended: BatchAppended
    status: Ints = field(default_factory=_no_ints)
    errors: Sequence[ItemError] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk(_FromJSON):
    """One chunk, tokens `start` .. `stop`-1, with its recall counters; `key` [D] when asked for."""

    index: int
    start: int
    stop: int
    sealed: bool
    tier: str
    key_norm: float
    num_recalls: int
    mass: float
    last_recalled_at: str | None
    key: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class ChunkDetail:
    """One chunk with its tokens' payloads, and `embeddings` [stop-start, D] when asked for."""

    chunk: Chunk
    payloads: Sequence[Mapping[str, Any] | None]
    embeddings: Floats | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall(_FromJSON):
    """The account of one attend. `chunks` holds `index` and `weight`, lists [Q', K]."""

    at: str
    request_id: str
    note: str | None = None
    """What was asked, as the attend's `note` said it."""
    model: str
    length: int
    start: int
    stop: int
    top_k: int
    num_queries: int
    chunks: Mapping[str, Any]
    recalled: Sequence[Sequence[Mapping[str, Any]]] | None
    model_hash: str = ""
    """Of the weights that it was computed with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(_FromJSON):
    """A model as served: `config` its settings; `bytes`, `created_at` of one that was put; `error` if it cannot be."""

    name: str
    source: str
    hash: str | None
    bytes: int | None
    config: Mapping[str, Any] | None
    created_at: str | None
    num_sessions: int
    """Of the caller's namespace, those that name it."""
    error: str | None
