"""What every store promises of sessions that share tokens; part of the contract that each backend's tests subclass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from storage.base import (
    Append,
    Appended,
    Compact,
    CreateSession,
    DeleteSession,
    Fork,
    KeepSketches,
    KeyReused,
    NoSuchSession,
    Quota,
    QuotaExceeded,
    SessionExists,
    SessionKey,
    SessionRow,
    SetQuota,
    Store,
    Summary,
    Truncate,
    Write,
    WriteResult,
    WrongLength,
)

NOW = 1_000_000.0
TOKEN_BYTES = 7
SIZE = 5
"""Tokens of a chunk."""


def token(value: int) -> bytes:
    return bytes([value % 256] * TOKEN_BYTES)


def write(store: Store, *writes: Write, now: float = NOW) -> list[WriteResult]:
    return store.write(writes, now=now)


def new(store: Store, name: str, num_tokens: int = 0, **values: Any) -> int:
    """A session of tokens 0, 1, 2, ..., three at a time, each with its number as payload; its sid."""
    (row,) = write(store, CreateSession(SessionRow(name, {"labels": {}}, NOW, **values)))
    assert isinstance(row, SessionRow), row
    grow(store, row.sid, 0, num_tokens)
    return row.sid


def grow(store: Store, sid: int, start: int, stop: int, at_once: int = 3, shift: int = 0, **values: Any) -> None:
    """Tokens start .. stop-1, their values shifted, so that one can tell whose they are."""
    for first in range(start, stop, at_once):
        some = range(first, min(first + at_once, stop))
        data = b"".join(token(number + shift) for number in some)
        bodies = [b"%d" % (number + shift) for number in some]
        (answer,) = write(store, Append(sid, len(some), data, bodies, if_length=first, **values))
        assert isinstance(answer, Appended), answer


def fork(store: Store, sid: int, name: str, length: int | None = None, **values: Any) -> int:
    (row,) = write(store, Fork(sid, SessionRow(name, {"labels": {}}, NOW, **values), SIZE, length))
    assert isinstance(row, SessionRow), row
    return row.sid


def truncate(store: Store, sid: int, length: int, **values: Any) -> WriteResult:
    (outcome,) = write(store, Truncate(sid, length, SIZE, **values))
    return outcome


def purge(store: Store) -> None:
    while store.purge():
        pass


def expect(store: Store, name: str, first: int, *parts: tuple[int, int]) -> None:
    """A session holds, from `first` on, tokens up to each stop with its shift; every way of reading says so."""
    row = store.get_session(SessionKey("default", name))
    assert row is not None
    values, start = [], first
    for stop, shift in parts:
        values += [number + shift for number in range(start, stop)]
        start = stop
    assert (row.first_position, row.length, row.num_bytes) == (first, start, len(values) * TOKEN_BYTES), name
    blocks = list(store.read_blocks(row.sid))
    assert b"".join(block.data for block in blocks) == b"".join(map(token, values)), name
    assert [block.start for block in blocks] == [first, *(b.start + b.num_tokens for b in blocks[:-1])][: len(blocks)]
    assert store.read_payload_range(row.sid, 0, 10**6) == {first + n: b"%d" % value for n, value in enumerate(values)}
    some = list(range(0, start + 9, 2))
    assert store.read_payloads(row.sid, some) == {n: b"%d" % values[n - first] for n in some if first <= n < start}
    for low in range(first, start):
        held = {at: block for block in store.read_blocks(row.sid, low, low + 1) for at in range(block.start, start)}
        assert held[low].data[(low - held[low].start) * TOKEN_BYTES :][:TOKEN_BYTES] == token(values[low - first])
    assert list(store.verify()) == []


class BranchContract:
    """Subclasses give `store`."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        raise NotImplementedError

    def test_a_fork_has_the_first_tokens_of_its_parent(self, store: Store) -> None:
        parent = new(store, "parent", 17)
        child = fork(store, parent, "child", 11)
        grow(store, child, 11, 20, shift=100)
        grow(store, parent, 17, 23)
        expect(store, "parent", 0, (23, 0))
        expect(store, "child", 0, (11, 0), (20, 100))
        assert fork(store, parent, "all") and fork(store, parent, "none", 0)
        expect(store, "all", 0, (23, 0))
        expect(store, "none", 0)

    def test_forks_of_forks(self, store: Store) -> None:
        sid, parts = new(store, "s0", 13), [(13, 0)]
        for number in range(1, 5):
            length = 13 * number - 4
            sid = fork(store, sid, f"s{number}", length)
            parts[-1] = (length, parts[-1][1])
            parts.append((13 * (number + 1), 40 * number))
            grow(store, sid, length, 13 * (number + 1), shift=40 * number)
            expect(store, f"s{number}", 0, *parts)
        early = fork(store, sid, "early", 7)
        grow(store, early, 7, 9, shift=9)
        expect(store, "early", 0, (7, 0), (9, 9))

    @pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 17])
    def test_what_was_truncated_is_gone_and_positions_are_given_again(self, store: Store, length: int) -> None:
        sid = new(store, "a", 17)
        row = truncate(store, sid, length)
        assert row == store.get_session(SessionKey("default", "a"))
        expect(store, "a", 0, (length, 0))
        grow(store, sid, length, 21, shift=50)
        expect(store, "a", 0, (length, 0), (21, 50))

    @pytest.mark.parametrize("length", [0, 4, 11, 12, 14, 19])
    def test_truncation_of_what_others_share(self, store: Store, length: int) -> None:
        """Of the parent, whose tokens a child has; of the child itself; and of the child's child."""
        parent = new(store, "parent", 19)
        child = fork(store, parent, "child", 12)
        grow(store, child, 12, 19, shift=30)
        grandchild = fork(store, child, "grandchild", 15)
        truncate(store, parent, length)
        grow(store, parent, length, 25, shift=60)
        purge(store)
        expect(store, "parent", 0, (length, 0), (25, 60))
        expect(store, "child", 0, (12, 0), (19, 30))
        expect(store, "grandchild", 0, (12, 0), (15, 30))
        truncate(store, child, length)
        grow(store, child, length, 21, shift=90)
        purge(store)
        mine = [(min(length, 12), 0), *([(length, 30)] if length > 12 else [])]
        expect(store, "child", 0, *mine, (21, 90))
        expect(store, "grandchild", 0, (12, 0), (15, 30))
        truncate(store, grandchild, min(length, 15))
        expect(
            store,
            "grandchild",
            0,
            *[(min(stop, length, 15), shift) for stop, shift in [(12, 0), (15, 30)]][: 1 + (length > 12)],
        )
        expect(store, "child", 0, *mine, (21, 90))

    def test_truncated_again_and_again(self, store: Store) -> None:
        """No truncation leaves anything behind that the next reading would have to look through."""
        parent = new(store, "parent", 30)
        fork(store, parent, "child")
        for number in range(12):
            truncate(store, parent, 25 - number)
            grow(store, parent, 25 - number, 40, shift=number)
        expect(store, "parent", 0, (14, 0), (40, 11))
        expect(store, "child", 0, (30, 0))

    @pytest.mark.parametrize("order", [("parent", "child", "other"), ("child", "parent", "other")])
    def test_the_others_stay_whole_when_one_is_deleted(self, store: Store, order: tuple[str, ...]) -> None:
        sids = {"parent": new(store, "parent", 700)}
        parts = {"parent": [(700, 0)], "child": [(333, 0), (400, 7)], "other": [(333, 0), (390, 7)]}
        sids["child"] = fork(store, sids["parent"], "child", 333)
        grow(store, sids["child"], 333, 400, shift=7)
        sids["other"] = fork(store, sids["child"], "other", 390)
        for name in order:
            assert isinstance(write(store, DeleteSession(sids.pop(name)))[0], SessionRow)
            for _ in range(2):
                for left in sids:
                    expect(store, left, 0, *parts[left])
                purge(store)
        assert store.totals().num_bytes == 0

    def test_trimming_lets_go_of_what_is_shared(self, store: Store) -> None:
        parent = new(store, "parent", 20, max_tokens=22)
        child = fork(store, parent, "child", 17, max_tokens=22)
        grow(store, parent, 20, 41, trim_chunk=SIZE)
        expect(store, "parent", 20, (41, 0))
        expect(store, "child", 0, (17, 0))
        grow(store, child, 17, 29, shift=50, trim_chunk=SIZE)
        expect(store, "child", 10, (17, 0), (29, 50))
        late = fork(store, child, "late", 10)
        expect(store, "late", 10)
        grow(store, late, 10, 12, shift=80)
        grow(store, child, 29, 60, shift=50, trim_chunk=SIZE)
        purge(store)
        expect(store, "child", 40, (60, 50))
        expect(store, "late", 10, (12, 80))
        truncate(store, child, 0)
        grow(store, child, 0, 3, shift=4)
        expect(store, "child", 0, (3, 4))

    def test_what_cannot_be_cut_is_refused(self, store: Store) -> None:
        sid = new(store, "a", 22)
        row = SessionRow("b", {}, NOW)
        for refused in write(
            store, Fork(sid, row, SIZE, 23), Truncate(sid, 23, SIZE), Truncate(sid, 3, SIZE, if_length=4)
        ):
            assert isinstance(refused, WrongLength) and refused.length == 22
        missing, taken, gone = write(
            store, Fork(99, row, SIZE), Fork(sid, SessionRow("a", {}, NOW), SIZE), Truncate(99, 0, SIZE)
        )
        assert isinstance(missing, NoSuchSession) and isinstance(taken, SessionExists)
        assert isinstance(gone, NoSuchSession)
        expect(store, "a", 0, (22, 0))

    def test_before_what_was_trimmed_only_all_can_go(self, store: Store) -> None:
        sid = new(store, "a", 0, max_tokens=13)
        grow(store, sid, 0, 22, trim_chunk=SIZE)
        for length in (1, 9):
            refused = [*write(store, Fork(sid, SessionRow("b", {}, NOW), SIZE, length)), truncate(store, sid, length)]
            assert all(isinstance(one, WrongLength) for one in refused)
        expect(store, "a", 10, (22, 0))
        assert truncate(store, sid, 10) == store.get_session(SessionKey("default", "a"))
        expect(store, "a", 10)
        grow(store, sid, 10, 12, shift=5)
        expect(store, "a", 10, (12, 5))

    def test_a_group_sees_what_came_before_in_it(self, store: Store) -> None:
        sid = new(store, "a", 10)
        first, second = SessionRow("b", {}, NOW), SessionRow("c", {}, NOW)
        outcomes = write(
            store,
            Append(sid, 1, token(10), [b"10"]),
            Fork(sid, first, SIZE),
            Append(sid, 1, token(11), [b"11"]),
            Truncate(sid, 8, SIZE, if_length=12),
            Append(sid, 1, token(58), [b"58"], if_length=8),
            Fork(sid, second, SIZE, 9),
            Append(sid + 1, 1, token(71), [b"71"], if_length=11),
            Truncate(sid + 2, 3, SIZE),
            Append(sid + 2, 1, token(93), [b"93"]),
        )
        assert [type(one) for one in outcomes] == [
            *(Appended, SessionRow, Appended, SessionRow, Appended, SessionRow, Appended, SessionRow, Appended)
        ]
        expect(store, "a", 0, (8, 0), (9, 50))
        expect(store, "b", 0, (11, 0), (12, 60))
        expect(store, "c", 0, (3, 0), (4, 90))

    def test_a_truncated_append_can_be_made_again(self, store: Store) -> None:
        """Its idempotency key goes with it, and only then, also within a group; a fork has none of its parent's."""
        sid = new(store, "a", 2)
        once, again = (Append(sid, 3, token(1) * 3, [b"1"] * 3, idempotency_key=key, digest=b"d") for key in "kl")
        write(store, once, again)
        truncate(store, sid, 5)
        assert write(store, once, again) == [Appended(2, 5, replayed=True), Appended(5, 8)]
        answers = write(store, Truncate(sid, 4, SIZE), once, once, again._replace(digest=b"e"), again)
        assert answers[1:4] == [Appended(4, 7), Appended(4, 7, replayed=True), Appended(7, 10)]
        assert isinstance(answers[4], KeyReused)
        child = fork(store, sid, "child", 9)
        assert write(store, once._replace(sid=child)) == [Appended(9, 12)]

    def test_a_quota_counts_what_a_session_sees(self, store: Store) -> None:
        write(store, SetQuota(Quota("default", max_sessions=3, max_tokens=20, max_bytes=20 * TOKEN_BYTES)))
        sid = new(store, "a", 9)
        fork(store, sid, "b")
        row = SessionRow("c", {}, NOW)
        (refused,) = write(store, Fork(sid, row, SIZE, 3))
        assert isinstance(refused, QuotaExceeded)
        assert isinstance(write(store, Truncate(sid, 8, SIZE), Fork(sid, row, SIZE, 3))[1], SessionRow)
        assert store.totals("default").num_tokens == 20
        for outcome in write(store, Append(sid, 1, token(1)), Fork(sid, SessionRow("d", {}, NOW), SIZE, 0)):
            assert isinstance(outcome, QuotaExceeded)
        write(store, DeleteSession(sid))
        assert isinstance(write(store, Append(sid + 1, 8, token(1) * 8))[0], Appended)

    def test_summaries_of_what_is_shared(self, store: Store) -> None:
        """A chunk's is kept where its last token is: whoever reads it there reads the same tokens before."""
        parent = new(store, "parent", 40)
        write(store, Compact(parent, Summary(0, 4, b"00112233"), SIZE))
        child = fork(store, parent, "child", 33)
        grow(store, child, 33, 45, shift=50)
        deep = fork(store, child, "deep", 38)
        assert list(store.read_summaries(child)) == [Summary(0, 4, b"00112233")]
        (refused,) = write(store, Compact(child, Summary(0, 9, b"x" * 9), SIZE))
        assert isinstance(refused, WrongLength) and refused.length == 4
        (done,) = write(store, Compact(child, Summary(4, 5, b"44556c7c8c"), SIZE))
        assert isinstance(done, SessionRow)
        assert b"".join(one.data for one in store.read_summaries(child)) == b"00112233" + b"44556c7c8c"
        assert b"".join(one.data for one in store.read_summaries(deep)) in (b"00112233", b"00112233" + b"44556c")
        (outcome,) = write(store, Compact(parent, Summary(4, 4, b"44556p7p"), SIZE))
        if isinstance(outcome, WrongLength):  # where the log is the parent's too, the child has done a part of it
            write(store, Compact(parent, Summary(outcome.length, 8 - outcome.length, b"6p7p"), SIZE))
        assert b"".join(one.data for one in store.read_summaries(parent)) == b"00112233" + b"44556p7p"
        truncate(store, parent, 31)
        assert b"".join(one.data for one in store.read_summaries(parent)) == b"001122334455"
        write(store, DeleteSession(parent))
        purge(store)
        assert b"".join(one.data for one in store.read_summaries(child)) == b"00112233" + b"44556c7c8c"
        expect(store, "child", 0, (33, 0), (45, 50))
        expect(store, "deep", 0, (33, 0), (38, 50))

    def test_sketches_of_what_is_shared(self, store: Store) -> None:
        """They belong to logs, as summaries do: what one session had made serves all that share the tokens."""

        def kept(sid: int) -> bytes:
            return b"".join(one.data for one in store.read_sketches(sid, 1))

        parent = new(store, "parent", 40)
        write(store, KeepSketches(parent, Summary(0, 4, b"00112233"), SIZE, 1))
        child = fork(store, parent, "child", 33)
        grow(store, child, 33, 45, shift=50)
        assert kept(child) == b"00112233"
        write(store, KeepSketches(child, Summary(4, 5, b"44556c7c8c"), SIZE, 1))
        assert kept(child) == b"00112233" + b"44556c7c8c"
        assert kept(parent).startswith(b"00112233") and b"c" not in kept(parent)
        write(store, KeepSketches(parent, Summary(2, 6, b"223344556p7p"), SIZE, 1))
        assert kept(parent) == b"00112233" + b"44556p7p" and kept(child) == b"00112233" + b"44556c7c8c"
        truncate(store, parent, 31)
        assert kept(parent) == b"001122334455"
        grow(store, parent, 31, 40, shift=70)
        write(store, KeepSketches(parent, Summary(6, 2, b"6t7t"), SIZE, 1))
        assert kept(parent) == b"001122334455" + b"6t7t" and kept(child) == b"00112233" + b"44556c7c8c"
        write(store, DeleteSession(parent))
        purge(store)
        assert kept(child) == b"00112233" + b"44556c7c8c"
        truncate(store, child, 0)
        purge(store)
        grow(store, child, 0, 45, shift=90)
        assert kept(child) == b"" and list(store.verify()) == []

    def test_episodes_of_a_branch(self, store: Store) -> None:
        parent = new(store, "parent")
        for number in range(6):
            grow(store, parent, 4 * number, 4 * number + 4, episode=(None, 1, 1, 2, 2, 3)[number])
        child = fork(store, parent, "child", 14)
        grow(store, child, 14, 16, episode=2)
        grow(store, child, 16, 18, episode=5)
        assert store.read_episodes(child, 99) == [(0, None), (4, 1), (12, 2), (16, 5)]
        assert store.read_episodes(child, 13) == [(0, None), (4, 1), (12, 2)]
        truncate(store, parent, 5)
        assert store.read_episodes(parent, 99) == [(0, None), (4, 1)]

    def test_a_long_session_forgets_at_once_and_purges_by_and_by(self, store: Store) -> None:
        sid = new(store, "a")
        for first in range(0, 6_000, 500):
            write(store, *(Append(sid, 1, token(n), [b"{}"]) for n in range(first, first + 500)))
        truncate(store, sid, 3)
        assert len(list(store.read_blocks(sid))) == 3
        write(store, Append(sid, 2, token(1) * 2))
        assert list(store.verify()) == []
        purge(store)
        assert len(list(store.read_blocks(sid))) == 4 and list(store.verify()) == []
        assert truncate(store, sid, 0) == store.get_session(SessionKey("default", "a"))
