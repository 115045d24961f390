"""What was recalled of one session: a bounded ring of accounts, and counters per chunk.

Kept in host memory since the server started, whether the session is on the device or not; a restart begins anew. With
a ring of none, nothing is counted either. Touched on the event loop only.
Does not know how attention is computed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from htm_service.records import AttendRequest, AttendResult, Floats, Ints, Recall, Recalled

ScalarT = TypeVar("ScalarT", bound=np.generic)

QUERIES_KEPT = 8
"""Queries of one attend whose rows the ring keeps."""
TOKENS_KEPT = 16
"""Recalled tokens per query that the ring keeps."""
QUERY_BYTES_KEPT = 64 << 10
"""Of all first queries, which are kept so that the last recalls can be explained later."""
SETTLED_TOGETHER = 16
NEW_BYTES = 32 << 10
"""Of queries that wait to be settled."""
UNCOUNTED = 1_024
"""Selected chunks that are counted together."""
TRIMMED_TOGETHER = 1_024


New = tuple[AttendRequest, Ints, Floats, Sequence[Sequence[Recalled]] | None, int, str, int, float]
"""An attend's request, chunks, weights, recalled tokens, length, model, `top_k` and time."""


class RecallLog:
    """See the head of this module."""

    def __init__(self, max_recalls: int, first_chunk: int = 0) -> None:
        self._ring: deque[Recall] = deque(maxlen=max_recalls)
        self._new: list[New] = []
        """Attends that are neither counted nor in the ring yet."""
        self._num_new_bytes = 0
        self._queries: deque[Floats] | None = None
        """The first queries of the last accounts, as many as QUERY_BYTES_KEPT holds."""
        self._uncounted: list[tuple[Ints, Floats, float]] = []
        """Chunk indexes, their weights and the time of attends that the counters do not hold yet."""
        self._num_uncounted = 0
        self._first_chunk = first_chunk
        """Where the counters begin."""
        self._num_recalls = np.zeros(0, dtype=np.int64)
        self._mass = np.zeros(0, dtype=np.float64)
        self._last_at = np.zeros(0, dtype=np.float64)

    def add(self, request: AttendRequest, result: AttendResult, *, model: str, top_k: int, now: float) -> None:
        """Keep one attend, to be counted and accounted for with the next ones, or when someone looks."""
        _, index, weight, recalled, length, *_ = result  # not the output: it is a view of a whole batch's
        self._new.append((request, index, weight, recalled, length, model, top_k, now))
        self._num_new_bytes += request.queries.nbytes
        is_large = request.is_masked or result.recalled is not None
        if is_large or len(self._new) >= SETTLED_TOGETHER or self._num_new_bytes >= NEW_BYTES:
            self._settle()

    def _settle(self) -> None:
        """Count the new attends and make their accounts: many at once, because the first of them is the dear one."""
        new, self._new, self._num_new_bytes = self._new, [], 0
        for request, index, weight, recalled, length, model, top_k, now in new:
            result = AttendResult(request.queries, index, weight, recalled, length)
            if index.size and self.is_kept:  # an empty session's would be kept for ever: they never add up to UNCOUNTED
                self._uncounted.append((index, weight, now))
                self._num_uncounted += index.size
            self._ring.append(account(request, result, model=model, top_k=top_k, now=now))
            self._keep_query(request.queries[0])
        if self._num_uncounted >= UNCOUNTED:
            self._count()

    def _keep_query(self, query: Floats) -> None:
        if self._queries is None:  # now it is known how wide they are
            self._queries = deque(maxlen=min(self._ring.maxlen or 0, QUERY_BYTES_KEPT // max(query.nbytes, 1)))
        if self._queries.maxlen:
            self._queries.append(query.copy())

    @property
    def is_kept(self) -> bool:
        """Whether accounts are kept at all, and attends counted."""
        return bool(self._ring.maxlen)

    def latest(self, limit: int) -> list[Recall]:
        """The last accounts, newest first; the first of them with their queries."""
        self._settle()
        recalls = list(self._ring)[: -limit - 1 : -1]
        for place, query in enumerate(itertools.islice(reversed(self._queries or ()), len(recalls))):
            recalls[place] = recalls[place]._replace(query=query)
        return recalls

    def of_chunk(self, index: int) -> tuple[int, float, float | None]:
        """How often chunk `index` was taken, the mass it received, and when last."""
        self._count()
        index -= self._first_chunk
        if not 0 <= index < len(self._num_recalls) or self._num_recalls[index] == 0:
            return 0, 0.0, None
        return int(self._num_recalls[index]), float(self._mass[index]), float(self._last_at[index])

    def heat(self, first: int, num_chunks: int, num_each: int) -> tuple[Ints, npt.NDArray[np.float64]]:
        """How often chunks were taken and the mass they received, summed over runs of `num_each` chunks from `first`
        on: two arrays [b].
        """
        self._count()
        begin = max(first - self._first_chunk, 0)
        some = slice(begin, max(begin, first + num_chunks - self._first_chunk))
        ahead = max(self._first_chunk - first, 0)
        num_runs = -(-num_chunks // num_each)

        def sums(counters: npt.NDArray[ScalarT]) -> npt.NDArray[ScalarT]:
            whole = np.zeros(num_runs * num_each, dtype=counters.dtype)
            found = counters[some][: max(num_chunks - ahead, 0)]
            whole[ahead : ahead + len(found)] = found
            return whole.reshape(num_runs, num_each).sum(axis=1)  # type: ignore[no-any-return]

        return sums(self._num_recalls), sums(self._mass)

    def trim(self, first_chunk: int) -> None:
        """Chunks before this one were trimmed; many of them at a time leave the counters."""
        num_chunks = first_chunk - self._first_chunk
        if num_chunks < TRIMMED_TOGETHER:
            return
        self._count()
        self._first_chunk = first_chunk
        self._num_recalls = self._num_recalls[num_chunks:].copy()
        self._mass = self._mass[num_chunks:].copy()
        self._last_at = self._last_at[num_chunks:].copy()

    def _count(self) -> None:
        """Bring the counters up to date: for many attends at once, because numpy takes its time to begin."""
        if self._new:
            self._settle()
        if not self._uncounted:
            return
        index = np.concatenate([index.ravel() for index, _, _ in self._uncounted])
        weight = np.concatenate([weight.ravel() for _, weight, _ in self._uncounted])
        at = np.repeat([now for _, _, now in self._uncounted], [index.size for index, _, _ in self._uncounted])
        self._uncounted.clear()
        self._num_uncounted = 0
        index -= self._first_chunk
        taken = index >= 0
        self._grow(int(index.max(initial=-1)) + 1)
        np.add.at(self._num_recalls, index[taken], 1)
        np.add.at(self._mass, index[taken], weight[taken])
        np.maximum.at(self._last_at, index[taken], at[taken])

    def _grow(self, num_chunks: int) -> None:
        have = len(self._num_recalls)
        if num_chunks <= have:
            return
        more = max(num_chunks - have, have)
        self._num_recalls = np.pad(self._num_recalls, (0, more))
        self._mass = np.pad(self._mass, (0, more))
        self._last_at = np.pad(self._last_at, (0, more))


def account(request: AttendRequest, result: AttendResult, *, model: str, top_k: int, now: float) -> Recall:
    """The account of one attend, without its query."""
    index, rows = result.chunk_index, result.recalled
    return Recall(
        at=now,
        request_id=request.request_id,
        note=request.note,
        query=None,
        episodes=request.episodes,
        is_masked=request.is_masked,
        model=model,
        length=result.length,
        start=request.start,
        stop=result.length if request.stop is None else request.stop,
        top_k=top_k,
        num_queries=len(index),
        chunk_index=_first_rows(index),
        chunk_weight=_first_rows(result.chunk_weight),
        recalled=None if rows is None else [_without_payloads(row[:TOKENS_KEPT]) for row in rows[:QUERIES_KEPT]],
    )


def _first_rows(array: npt.NDArray[ScalarT]) -> npt.NDArray[ScalarT]:
    """The first QUERIES_KEPT rows; a copy of them where a view would keep many more in memory."""
    return array if len(array) <= QUERIES_KEPT else array[:QUERIES_KEPT].copy()


def _without_payloads(row: Sequence[Recalled]) -> list[Recalled]:
    return [replace(token, payload=None) for token in row]
