"""What was recalled of one session: a bounded ring of accounts, and counters per chunk.

Kept in host memory since the server started, whether the session is on the device or not; a restart begins anew. With
a ring of none, nothing is counted either. Touched on the event loop only.
Does not know how attention is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from htm_service.records import AttendRequest, AttendResult, Floats, Ints, Recall

ScalarT = TypeVar("ScalarT", bound=np.generic)

QUERIES_KEPT = 8
"""Queries of one attend whose rows the ring keeps."""
TOKENS_KEPT = 16
"""Recalled tokens per query that the ring keeps."""
EPISODES_KEPT = 64
"""Of one attend that was asked for some; of one asked for more none are kept, as of masks."""
ACCOUNT_BYTES = 700
TOKEN_BYTES = 150
"""About what an account takes in memory besides what is counted, and each of its recalled tokens."""
QUERY_BYTES_KEPT = 64 << 10
"""Of all first queries, which are kept so that the last recalls can be explained later."""
COUNTED_TOGETHER = 48
"""Attends: numpy takes its time to begin, and from 500 numbers on, 8 of each, it lets another thread in."""
TRIMMED_TOGETHER = 1_024


class RecallLog:
    """See the head of this module.

    What it keeps of an attend is little and in few pieces, because an attend comes to memory that is in no cache.
    """

    def __init__(self, max_recalls: int, first_chunk: int = 0, settle: Callable[[], None] = lambda: None) -> None:
        """`settle` adds what is still to be added."""
        self.num_bytes = 0
        """About what the accounts take in memory, their queries included."""
        self._settle = settle
        self._ring: deque[Recall] = deque(maxlen=max_recalls)
        self._num_uncounted = 0
        """The last so many accounts are not in the counters yet."""
        self._queries = memoryview(b"")
        """The first queries of the last accounts, as many as QUERY_BYTES_KEPT holds, in turn."""
        self._num_kept = 0
        """Queries that were written there."""
        self._query_bytes = 0
        self._first_chunk = first_chunk
        """Where the counters begin."""
        self._num_recalls = np.zeros(0, dtype=np.int64)
        self._mass = np.zeros(0, dtype=np.float64)
        self._last_at = np.zeros(0, dtype=np.float64)

    def add(self, recall: Recall, request: AttendRequest, result: AttendResult) -> None:
        """Keep the account of one attend, to be counted with the next ones, or when someone looks."""
        if recall.num_rows < recall.num_queries:  # it has not all that is to be counted
            self._add_up_ring()
            index, weight = result.chunk_index.ravel(), result.chunk_weight.ravel()
            self._add_up(index, weight, np.full(len(index), recall.at))
        else:
            self._num_uncounted += 1
        if len(self._ring) == self._ring.maxlen:
            self.num_bytes -= bytes_of(self._ring[0])
        self._ring.append(recall)
        self.num_bytes += bytes_of(recall)
        self._keep_query(request.queries[0])
        if self._num_uncounted >= min(COUNTED_TOGETHER, self._ring.maxlen or 0):
            self._add_up_ring()

    def _keep_query(self, query: Floats) -> None:
        if not self._query_bytes:  # now it is known how wide they are
            self._query_bytes = query.nbytes
            most = min(self._ring.maxlen or 0, QUERY_BYTES_KEPT // query.nbytes)
            self._queries = np.empty(most * query.nbytes, np.uint8).data
            self.num_bytes += len(self._queries)
        if self._queries:
            at = self._num_kept * self._query_bytes % len(self._queries)
            self._queries[at : at + self._query_bytes] = query.tobytes()  # numpy's own copy lets another thread in
            self._num_kept += 1

    def _kept_queries(self) -> list[bytes]:
        """The queries that are kept, the newest first."""
        size, whole = self._query_bytes, len(self._queries)
        num = min(self._num_kept, len(self._ring), whole // size if size else 0)
        places = (at * size % whole for at in range(self._num_kept - 1, self._num_kept - 1 - num, -1))
        return [bytes(self._queries[at : at + size]) for at in places]

    def latest(self, limit: int) -> list[Recall]:
        """The last accounts, newest first; the first of them with their queries."""
        self._settle()
        recalls = list(self._ring)[: -limit - 1 : -1]
        for place, query in enumerate(self._kept_queries()[: len(recalls)]):
            recalls[place] = recalls[place]._replace(query=np.frombuffer(query, np.float32))
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
            found = counters[some][: max(num_chunks - ahead, 0)]
            summed = np.zeros(num_runs, dtype=counters.dtype)
            np.add.at(summed, (ahead + np.arange(len(found))) // num_each, found)  # of chunks that are here alone
            return summed

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

    def truncate(self, length: int, chunk_size: int) -> None:
        """Forget what was recalled of the tokens from position `length` on: the accounts of attends that saw some, and
        the counters of chunks that have none left.
        """
        self._count()
        kept = [(recall, query) for recall, query in self._with_queries() if recall.stop <= length]
        self._ring.clear()
        self._ring.extend(recall for recall, _ in kept)
        self.num_bytes = len(self._queries) + sum(map(bytes_of, self._ring))
        self._num_kept = 0
        for _, query in kept:
            if query is not None:
                self._keep_query(np.frombuffer(query, np.uint8))
        self._first_chunk = min(self._first_chunk, length // chunk_size)
        gone = slice(-(-length // chunk_size) - self._first_chunk, None)
        for counters in (self._num_recalls, self._mass, self._last_at):
            counters[gone] = 0

    def forget(self) -> None:
        """Forget the accounts; what they took stays counted."""
        self._count()
        self._ring.clear()
        self._queries = memoryview(b"")
        self.num_bytes = self._num_kept = self._query_bytes = 0

    def _with_queries(self) -> list[tuple[Recall, bytes | None]]:
        """The accounts, oldest first, the last of them with their queries."""
        queries = self._kept_queries()[::-1]
        return list(zip(self._ring, [*[None] * (len(self._ring) - len(queries)), *queries], strict=True))

    def _count(self) -> None:
        """Bring the counters up to date."""
        self._settle()
        self._add_up_ring()

    def _add_up_ring(self) -> None:
        """Count those of the ring that are not counted yet."""
        if not self._num_uncounted:
            return
        new = list(self._ring)[-self._num_uncounted :]
        self._num_uncounted = 0
        index = np.frombuffer(b"".join([recall.index_bytes for recall in new]), np.int64)
        weight = np.frombuffer(b"".join([recall.weight_bytes for recall in new]), np.float32)
        at = np.array([recall.at for recall in new])
        self._add_up(index, weight, at.repeat([len(recall.weight_bytes) // 4 for recall in new]))

    def _add_up(self, index: Ints, weight: Floats, at: npt.NDArray[np.float64]) -> None:
        """Count chunks, each with its weight and its time; all [n]."""
        index = index - self._first_chunk
        taken = index >= 0
        index = index[taken]
        self._grow(int(index.max(initial=-1)) + 1)
        np.add.at(self._num_recalls, index, 1)
        np.add.at(self._mass, index, weight[taken].astype(np.float64))  # 15 times as fast as with float32
        np.maximum.at(self._last_at, index, at[taken])

    def _grow(self, num_chunks: int) -> None:
        have = len(self._num_recalls)
        if num_chunks <= have:
            return
        more = max(num_chunks - have, have)
        self._num_recalls = np.pad(self._num_recalls, (0, more))
        self._mass = np.pad(self._mass, (0, more))
        self._last_at = np.pad(self._last_at, (0, more))


def bytes_of(recall: Recall) -> int:
    """About what an account takes in memory, without its query."""
    num_tokens = 0 if recall.recalled is None else sum(map(len, recall.recalled))
    text = recall.note or ""
    return ACCOUNT_BYTES + len(recall.index_bytes) + len(recall.weight_bytes) + len(text) + TOKEN_BYTES * num_tokens


def account(request: AttendRequest, result: AttendResult, model: str, now: float) -> Recall:
    """The account of one attend, without its query. `result` is without payloads."""
    index, weight, rows = result.chunk_index, result.chunk_weight, result.recalled
    num_queries = len(index)
    episodes, is_masked = request.episodes, request.is_masked
    if episodes is not None and len(episodes) > EPISODES_KEPT:
        episodes, is_masked = None, True
    if num_queries > QUERIES_KEPT:
        index, weight = index[:QUERIES_KEPT], weight[:QUERIES_KEPT]
    return Recall(
        now,
        request.request_id,
        request.note,
        None,
        episodes,
        is_masked,
        model,
        result.model_hash,
        result.length,
        request.start,
        result.length if request.stop is None else request.stop,
        result.top_k,
        num_queries,
        len(index),
        index.tobytes(),
        weight.tobytes(),
        None if rows is None else [row[:TOKENS_KEPT] for row in rows[:QUERIES_KEPT]],
    )
