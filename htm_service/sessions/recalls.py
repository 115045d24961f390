"""What was recalled of one session: a bounded ring of accounts, and counters per chunk.

Kept in host memory since the server started, whether the session is on the device or not; a restart begins anew. With
a ring of none, nothing is counted either. Touched on the event loop only.
Does not know how attention is computed.
"""

from __future__ import annotations

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
QUERY_BYTES_KEPT = 16 << 10
"""Of one query, which the ring keeps so that it can be explained later: a wider one it does not."""
UNCOUNTED = 1_024
"""Selected chunks that are counted together."""
TRIMMED_TOGETHER = 1_024


class RecallLog:
    """See the head of this module."""

    def __init__(self, max_recalls: int, first_chunk: int = 0) -> None:
        self._ring: deque[Recall] = deque(maxlen=max_recalls)
        self._uncounted: list[tuple[Ints, Floats, float]] = []
        """Chunk indexes, their weights and the time of attends that the counters do not hold yet."""
        self._num_uncounted = 0
        self._first_chunk = first_chunk
        """Where the counters begin."""
        self._num_recalls = np.zeros(0, dtype=np.int64)
        self._mass = np.zeros(0, dtype=np.float64)
        self._last_at = np.zeros(0, dtype=np.float64)

    def add(self, request: AttendRequest, result: AttendResult, *, model: str, top_k: int, now: float) -> Recall:
        """Count one attend and keep its account, which is answered."""
        index = result.chunk_index
        if (
            index.size and self._ring.maxlen
        ):  # an empty session's would be kept for ever: they never add up to UNCOUNTED
            self._uncounted.append((index, result.chunk_weight, now))
            self._num_uncounted += index.size
        if self._num_uncounted >= UNCOUNTED:
            self._count()
        recalled = None
        if result.recalled is not None:
            recalled = [_without_payloads(row[:TOKENS_KEPT]) for row in result.recalled[:QUERIES_KEPT]]
        first = request.queries[0]
        recall = Recall(
            at=now,
            request_id=request.request_id,
            note=request.note,
            query=first.copy() if first.nbytes <= QUERY_BYTES_KEPT else None,
            episodes=request.episodes,
            is_masked=request.mask is not None or request.chunk_mask is not None,
            model=model,
            length=result.length,
            start=request.start,
            stop=result.length if request.stop is None else request.stop,
            top_k=top_k,
            num_queries=len(index),
            chunk_index=_first_rows(index),
            chunk_weight=_first_rows(result.chunk_weight),
            recalled=recalled,
        )
        self._ring.append(recall)
        return recall

    @property
    def is_kept(self) -> bool:
        """Whether accounts are kept at all, and attends counted."""
        return bool(self._ring.maxlen)

    def latest(self, limit: int) -> list[Recall]:
        """The last accounts, newest first."""
        return list(self._ring)[: -limit - 1 : -1]

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


def _first_rows(array: npt.NDArray[ScalarT]) -> npt.NDArray[ScalarT]:
    """The first QUERIES_KEPT rows; a copy of them where a view would keep many more in memory."""
    return array if len(array) <= QUERIES_KEPT else array[:QUERIES_KEPT].copy()


def _without_payloads(row: Sequence[Recalled]) -> list[Recalled]:
    return [replace(token, payload=None) for token in row]
