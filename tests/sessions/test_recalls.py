"""What the recall log keeps, and what it does not."""

import tracemalloc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from htm_service.records import AttendRequest, AttendResult
from htm_service.sessions.recalls import (
    EPISODES_KEPT,
    QUERIES_KEPT,
    QUERY_BYTES_KEPT,
    TRIMMED_TOGETHER,
    RecallLog,
    account,
)


@pytest.fixture
def traced() -> Iterator[None]:
    """Count what is allocated from here on."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def held_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def add(log: RecallLog, index: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> None:
    num_queries = len(index)
    request = AttendRequest(queries=np.zeros((num_queries, 3), np.float32))
    weight = np.where(index < 0, 0, 1).astype(np.float32)
    result = AttendResult(np.zeros((num_queries, 3), np.float32), index, weight, None, 7, top_k=2)
    log.add(account(request, result, "retrieval", 5.0), request, result)


def test_chunks_are_counted_when_asked_for() -> None:
    log = RecallLog(5)
    add(log, np.array([[1, 0], [1, -1]]))
    assert log.of_chunk(1) == (2, 2.0, 5.0)
    assert log.of_chunk(0) == (1, 1.0, 5.0)
    assert log.of_chunk(2) == (0, 0.0, None)


def test_attends_without_chunks_are_not_kept_for_counting() -> None:
    """Every attend to an empty session once stayed in memory until the session was inspected."""
    log = RecallLog(2)
    indexes = [np.empty((1, 0), np.int64) for _ in range(3)]
    oldest = weakref.ref(indexes[0])
    while indexes:
        add(log, indexes.pop(0))
    assert len(log.latest(5)) == 2 and oldest() is None


def test_an_account_keeps_its_rows_only() -> None:
    """A view of the first rows once kept the arrays of all 4,096 queries in memory, for each account."""
    log = RecallLog(1)
    add(log, np.zeros((4096, 2), np.int64))
    (recall,) = log.latest(1)
    assert recall.num_queries == 4096 and recall.chunk_index.shape == recall.chunk_weight.shape == (QUERIES_KEPT, 2)
    assert len(recall.index_bytes) == 2 * len(recall.weight_bytes) == QUERIES_KEPT * 2 * 8
    assert log.of_chunk(0) == (4096 * 2, 4096 * 2.0, 5.0), "all of them are counted"


def test_counters_of_trimmed_chunks_are_forgotten_and_the_others_keep_their_numbers() -> None:
    log = RecallLog(1)
    add(log, np.array([[3, 2_000], [2_000, 2_100]]))
    log.trim(TRIMMED_TOGETHER - 1)
    assert log.of_chunk(3)[0] == 1, "too few to be worth it"
    log.trim(1_999)
    add(log, np.array([[5, 2_000], [-1, 2_100]]))
    assert [log.of_chunk(index)[0] for index in (3, 5, 1_998, 2_000, 2_100, 9_999)] == [0, 0, 0, 3, 2, 0]


def test_counters_of_trimmed_chunks_take_no_memory(traced: None) -> None:
    log, num_chunks = RecallLog(1), 1_000_000
    add(log, np.array([[num_chunks, num_chunks + 1]]))
    assert log.of_chunk(num_chunks)[0] == 1 and held_bytes() > 8 * num_chunks
    log.trim(num_chunks)
    assert log.of_chunk(num_chunks)[0] == 1 and held_bytes() < 1 << 20


def test_counters_begin_with_the_first_chunk_that_is_left(traced: None) -> None:
    """After a restart those of a session that had trimmed a billion chunks once took 24 GB."""
    log = RecallLog(1, first_chunk=10**9)
    add(log, np.array([[10**9 + 1, 10**9 + 2]]))
    assert log.of_chunk(10**9 + 2) == (1, 1.0, 5.0)
    assert held_bytes() < 1 << 20


def test_the_last_recalls_keep_their_queries_within_bounds() -> None:
    """As many as QUERY_BYTES_KEPT holds, the newest; they are copies, and no output is kept with them."""
    log, width = RecallLog(64), QUERY_BYTES_KEPT // 4 // 10
    for number in range(40):
        queries = np.full((2, width), number, np.float32)
        result = AttendResult(queries, np.zeros((2, 1), np.int64), np.ones((2, 1), np.float32), None, 7)
        request = AttendRequest(queries=queries)
        log.add(account(request, result, "retrieval", 5.0), request, result)
    recalls = log.latest(64)
    kept = [recall.query for recall in recalls if recall.query is not None]
    assert len(recalls) == 40 and len(kept) == 10
    assert [query[0] for query in kept] == list(range(39, 29, -1))
    assert all(query.shape == (width,) for query in kept)


def test_accounts_say_what_they_take_and_can_be_forgotten(traced: None) -> None:
    """Nobody knew what those of all sessions took: some dozens of batches filled the memory."""
    log = RecallLog(64)
    index = np.arange(8 * 256).reshape(8, 256)
    add(log, index)
    before, held = log.num_bytes, held_bytes()
    for _ in range(40):
        add(log, index)
    assert 0.8 < (held_bytes() - held) / (log.num_bytes - before) < 1.25
    for _ in range(40):
        add(log, index[:1, :2])
    taken = log.num_bytes
    log.truncate(100, 1)
    assert log.num_bytes == taken, "none saw what was cut off"
    log.truncate(0, 1)
    assert log.latest(100) == [] and log.num_bytes < 1_000
    add(log, index)
    log.forget()
    assert log.num_bytes == 0 and log.latest(100) == [] and log.of_chunk(3)[0] == 1, "what was taken stays counted"
    add(log, index[:1, :2])
    (recall,) = log.latest(100)
    assert recall.query is not None


def test_an_account_keeps_few_episodes() -> None:
    """As many as a body could name, some megabytes in each account, so that one session's took half a gigabyte."""
    result = AttendResult(
        np.zeros((1, 3), np.float32), np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), None, 7
    )
    queries = np.zeros((1, 3), np.float32)
    for num_episodes, is_kept in ((EPISODES_KEPT, True), (EPISODES_KEPT + 1, False)):
        episodes = list(range(num_episodes))
        recall = account(AttendRequest(queries=queries, episodes=episodes), result, "retrieval", 5.0)
        assert recall.episodes == (episodes if is_kept else None) and recall.is_masked is not is_kept


def test_attends_of_any_number_of_queries_are_counted_once(traced: None) -> None:
    """Those of many queries at once, those of few together: each in the order it came, none twice."""
    log = RecallLog(3)
    for _ in range(5):
        add(log, np.array([[1, 0]]))
        add(log, np.zeros((QUERIES_KEPT + 1, 1), np.int64))
        add(log, np.empty((1, 0), np.int64))
    assert log.of_chunk(1)[0] == 5 and log.of_chunk(0)[0] == 5 * (1 + QUERIES_KEPT + 1)
    assert [recall.chunk_index.shape for recall in log.latest(5)] == [(1, 0), (QUERIES_KEPT, 1), (1, 2)]
