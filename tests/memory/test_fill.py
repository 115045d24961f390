"""Tokens that many sessions were appended together: in one step or session by session, the same to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from htm_service.dtypes import to_bytes
from htm_service.memory.cache import Cache
from htm_service.memory.chunks import NO_PAGE
from htm_service.memory.resident import Extent, Resident
from htm_service.records import DType
from htm_service.session_settings import SessionSettings
from storage.base import Block, SessionKey

SIZE = 5
SETTINGS = SessionSettings(
    dim=13,
    chunk_size=SIZE,
    model="retrieval",
    dtype="float32",
    open_chunk="attend",
    labels={},
    ttl_s=None,
    on_full="reject",
    max_tokens=None,
)


class Twins:
    """Sessions of several widths in two caches, one filled in one step and the other session by session."""

    def __init__(self, dtype: DType, num_sessions: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.caches = [Cache(torch.device("cpu"), 64 << 20) for _ in range(2)]
        widths = [13, 1, 131]
        self.sessions = [
            [
                Resident(SessionKey("default", f"s{at}"), at + 1, replace(SETTINGS, dim=dim, dtype=dtype), Extent(0, 0))
                for _ in self.caches
            ]
            for at, dim in zip(range(num_sessions), widths * num_sessions, strict=False)
        ]

    def append(self, at: int, num_tokens: int, episode: int | None = None, scale: float = 1.0) -> None:
        first = self.sessions[at][0]
        tokens = (scale * self.random.standard_normal((num_tokens, first.settings.dim))).astype(np.float32)
        block = Block(first.extent.length, num_tokens, to_bytes(tokens, first.settings.dtype), episode)
        for twin in self.sessions[at]:
            twin.publish(block, 0)

    def fill(self, some: list[int]) -> None:
        self.caches[0].fill_all([self.sessions[at][0] for at in some])
        for at in some:
            self.caches[1].fill(self.sessions[at][1])

    def check(self) -> None:
        for one, other in self.sessions:
            assert one.state == other.state and one.episodes == other.episodes and not one.pending
            if one.chunks is None or other.chunks is None:
                assert one.chunks is other.chunks
                continue
            assert one.chunks.length == other.chunks.length == one.extent.length
            assert one.chunks.keys.numpy().tobytes() == other.chunks.keys.numpy().tobytes()
            for chunk in range(one.chunks.num_chunks):
                num_held = min(SIZE, one.chunks.length - chunk * SIZE)
                pages = [twin.held.page(chunk)[:num_held].view(torch.uint8) for twin in (one, other)]
                assert torch.equal(*pages)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_in_one_step_and_one_by_one(dtype: DType) -> None:
    twins = Twins(dtype, 6, seed=1)
    for at in range(6):
        twins.append(at, 1 + 3 * at)
    twins.fill(list(range(6)))
    for turn in range(40):
        some = [at for at in range(6) if twins.random.random() < 0.8]
        for at in some:
            for _ in range(2 if twins.random.random() < 0.1 else 1):
                twins.append(at, 2 if twins.random.random() < 0.1 else 1, episode=turn // 9)
        twins.fill(some)
        twins.check()


def test_large_tokens_overflow_neither_way() -> None:
    twins = Twins("float32", 2, seed=2)
    for _ in range(7):
        for at in range(2):
            twins.append(at, 1, scale=1e38)
        twins.fill([0, 1])
    twins.check()
    assert torch.isfinite(twins.sessions[0][0].held.keys).all()


def test_room_for_some_is_not_taken_where_others_are_being_written() -> None:
    """One session needed a page, the page of another one was given to it, whose token then went there."""
    cache, random = Cache(torch.device("cpu"), 24 << 10), np.random.default_rng(5)
    sessions = [Resident(SessionKey("default", f"s{at}"), at + 1, SETTINGS, Extent(0, 0)) for at in range(60)]
    tokens = [np.zeros((0, 13), np.float32) for _ in sessions]
    for turn in range(30):
        for at, session in enumerate(sessions):
            new = random.standard_normal((1 if turn else 1 + at % SIZE, 13)).astype(np.float32)
            session.publish(Block(len(tokens[at]), len(new), new.tobytes()), 0)
            tokens[at] = np.concatenate((tokens[at], new))
        cache.fill_all(sessions)
        for session, expected in zip(sessions, tokens, strict=True):
            if session.state != "resident":
                continue
            held = session.held
            assert held.length == len(expected)
            for chunk in range(held.num_chunks):
                of_chunk = torch.from_numpy(expected[chunk * SIZE : (chunk + 1) * SIZE])
                if held.pages[chunk] != NO_PAGE:
                    assert torch.equal(held.page(chunk)[: len(of_chunk)], of_chunk)
                torch.testing.assert_close(held.keys[chunk], of_chunk.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert 0 < cache.reclaim.num_offloaded_sessions < len(sessions)


def test_what_is_not_here_stays_so() -> None:
    twins = Twins("float32", 4, seed=3)
    for at in range(4):
        twins.append(at, 3)
    twins.fill([0, 1, 2])
    for cache, twin in zip(twins.caches, twins.sessions[1], strict=True):
        cache.offload(twin)
    for twin in twins.sessions[2]:
        twin.num_begun += 1
        twin.publish_truncation(0, 2)
    for at in range(4):
        twins.append(at, 1)
    for twin in twins.sessions[3]:
        twin.is_deleted = True
    twins.fill([0, 1, 2])
    assert [one.state for one, _ in twins.sessions] == ["resident", "cold", "resident", "resident"]
    for one, other in twins.sessions[:3]:
        assert (one.chunks is None) == (other.chunks is None)
        if one.chunks is not None and other.chunks is not None:
            assert one.chunks.length == other.chunks.length == one.extent.length
            assert torch.equal(one.chunks.keys, other.chunks.keys)
    twins.fill([3])
    assert all(twin.chunks is None for twin in twins.sessions[3])


def test_a_loading_session_keeps_what_waits() -> None:
    twins = Twins("float32", 1, seed=4)
    twins.append(0, 3)
    twins.fill([0])
    for cache, twin in zip(twins.caches, twins.sessions[0], strict=True):
        cache.offload(twin)
        cache.begin_load(twin)
    twins.append(0, 1)
    twins.fill([0])
    assert [len(twin.pending) for twin in twins.sessions[0]] == [1, 1]
