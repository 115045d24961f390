"""The optional arguments of the calls, typed once for both clients; what is left out is the server's default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class SessionOptions(TypedDict, total=False):
    """Settings of a new session."""

    dim: int
    chunk_size: int
    model: str
    dtype: Literal["float32", "float16", "bfloat16"]
    open_chunk: Literal["attend", "exclude"]
    labels: Mapping[str, str]
    ttl_s: float
    max_tokens: int
    on_full: Literal["reject", "evict_oldest"]


class SessionChanges(TypedDict, total=False):
    """What can be changed later; `ttl_s` None removes the limit."""

    labels: Mapping[str, str]
    ttl_s: float | None
    model: str


Payloads = Sequence[Mapping[str, Any] | None]
"""One JSON object, or None, per token."""


BatchPayloads = Sequence[Payloads | None]
"""Of each session, or None."""


class AppendConditions(TypedDict, total=False):
    """Under which episode, whether at all, and what makes two appends the same one."""

    episode: int
    if_length: int
    idempotency_key: str


class AppendOptions(AppendConditions, total=False):
    """The same with the payloads, for a step's append."""

    payloads: Payloads


class RecallOptions(TypedDict, total=False):
    """Beside the queries [Q, D]: what they may see (`mask` [n], `chunk_mask` [M] or [Q, M])."""

    model: str
    top_k: int
    start: int
    stop: int | Sequence[int]
    episodes: Sequence[int]
    mask: Any
    chunk_mask: Any
    rank_by: Literal["weight", "score"]
    timeout_ms: float
    note: str


class AttendOptions(RecallOptions, total=False):
    """The same with what to answer, which a recall knows by itself."""

    returns: Sequence[Literal["output", "chunks", "tokens", "payloads"]]
    max_recalled: int


class ExplainOptions(AttendOptions, total=False):
    """The same with how many chunks to rank."""

    limit: int


class ModelOptions(TypedDict, total=False):
    """What a model does not know itself: a module tells all, a state dict no `heads`, `top_k` and `chunk_size`.

    `if_match`: only while the model has this hash. `if_new`: only when there is none of this name.
    """

    heads: int
    dim_head: int
    top_k: int
    chunk_size: int
    if_match: str | None
    if_new: bool


class SelectOptions(TypedDict, total=False):
    """Beside the queries [Q, D] of a select: what they may see, how many chunks they take, and what to answer."""

    top_k: int
    start: int
    stop: int
    episodes: Sequence[int]
    mask: Any
    chunk_mask: Any
    timeout_ms: float
    returns: Sequence[Literal["chunks", "keys", "tokens"]]


class SearchOptions(TypedDict, total=False):
    """Beside the queries [Q, D] and n of a search: what scores, what is visible, how carefully, and what to answer."""

    model: str
    start: int
    stop: int
    episodes: Sequence[int]
    mask: Any
    exact: bool
    oversample: int
    min_score: float
    timeout_ms: float


class SearchAllOptions(TypedDict, total=False):
    """The same through several sessions, all of each."""

    model: str
    episodes: Sequence[int]
    exact: bool
    oversample: int
    min_score: float
    timeout_ms: float


class BatchSearchOptions(TypedDict, total=False):
    """Of searches of many sessions: `model` one or for each, `mask` with the sessions in front, the rest for all."""

    model: str | Sequence[str | None]
    start: int
    stop: int
    episodes: Sequence[int]
    mask: Any
    exact: bool
    oversample: int
    min_score: float
    timeout_ms: float


class BatchAppendConditions(TypedDict, total=False):
    """Of appends to many sessions: `num_tokens` and `if_length` for each, `episode` one or for each."""

    num_tokens: Any
    episode: Any
    if_length: Any
    idempotency_key: str


class BatchAppendOptions(BatchAppendConditions, total=False):
    """The same with the payloads, for a batch_step's appends."""

    payloads: BatchPayloads


class BatchAttendOptions(TypedDict, total=False):
    """Of attends to many sessions: `model` and `start` one or for each, `stop` one, [Q] or, for each, [S, Q] or [S, 1],
    masks with the sessions in front, the rest for all.
    """

    model: str | Sequence[str | None]
    top_k: int
    start: Any
    stop: Any
    episodes: Sequence[int]
    mask: Any
    chunk_mask: Any
    rank_by: Literal["weight", "score"]
    timeout_ms: float
    note: str
    returns: Sequence[Literal["output", "chunks", "tokens", "payloads"]]
    max_recalled: int


class BatchSelectOptions(TypedDict, total=False):
    """Of selects of many sessions: `start` and `stop` as above, masks with the sessions in front, the rest for all."""

    top_k: int
    start: Any
    stop: Any
    episodes: Sequence[int]
    mask: Any
    chunk_mask: Any
    timeout_ms: float
    returns: Sequence[Literal["chunks", "keys", "tokens"]]


def check(call: str, options: Mapping[str, Any], known: type, *named: str) -> None:
    """Raises TypeError for an option that a call does not have; `named` are those with a parameter of their own."""
    names: frozenset[str] = known.__optional_keys__  # type: ignore[attr-defined]
    for name in options:
        if name not in names:
            raise TypeError(f"{call} has no option {name!r}; it has {', '.join(sorted(names.union(named)))}")
