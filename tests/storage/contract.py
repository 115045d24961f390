"""The contract of `storage/base.py` as one test class; each backend subclasses it and says how to open a store."""

from collections.abc import Sequence
from typing import Any

import pytest

from storage.base import (
    IDEMPOTENCY_SECONDS,
    Append,
    Appended,
    CreateSession,
    DeleteSession,
    KeyReused,
    NoSuchSession,
    Outcome,
    SessionExists,
    SessionFull,
    SessionRow,
    Store,
    UpdateSession,
    Write,
    WrongLength,
)


def make(store: Store, name: str, *, now: float = 1.0, max_tokens: int | None = None, **settings: Any) -> SessionRow:
    """A new session."""
    row = SessionRow(name, settings, now, max_tokens=max_tokens, updated_at=now)
    (created,) = store.write([CreateSession(row)], now=now)
    assert isinstance(created, SessionRow), created
    return created


def one(store: Store, write: Write, now: float = 2.0) -> Outcome:
    """The outcome of a group of one."""
    (outcome,) = store.write([write], now=now)
    return outcome


def data_of(store: Store, sid: int, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes of all blocks, which must follow each other."""
    parts, expected = [], None
    for block in store.read_blocks(sid, start, stop):
        assert expected is None or block.start == expected
        expected = block.start + block.num_tokens
        parts.append(block.data)
    return b"".join(parts)


class StoreContract:
    """What every store must do."""

    @pytest.fixture
    def store(self) -> Store:
        raise AssertionError("each backend opens its own")

    def test_create_find_update_delete(self, store: Store) -> None:
        settings = {"labels": {"a": "ü'\"%"}, "dim": 3, "ttl_s": None}
        row = make(store, "s", now=5.0, max_tokens=9, **settings)
        assert row.sid > 0 and (row.length, row.num_bytes, row.created_at, row.updated_at) == (0, 0, 5.0, 5.0)
        assert store.get_session("s") == row and row.max_tokens == 9 and row.settings == settings
        assert isinstance(one(store, CreateSession(row)), SessionExists)
        changed = one(store, UpdateSession(row.sid, {"dim": 4}))
        assert isinstance(changed, SessionRow) and changed.settings == {"dim": 4}
        assert store.get_session("s") == changed
        assert one(store, DeleteSession(row.sid)) == changed
        assert store.get_session("s") is None
        for write in (DeleteSession(row.sid), UpdateSession(row.sid, {}), Append(row.sid, 1, b"x")):
            assert isinstance(one(store, write), NoSuchSession)
        assert make(store, "s").sid > row.sid  # never used twice

    def test_appends_follow_each_other(self, store: Store) -> None:
        sid = make(store, "s").sid
        assert one(store, Append(sid, 2, b"aabb"), now=7.0) == Appended(0, 2)
        group = [Append(sid, 1, b"cc", episode=4), Append(sid, 3, b"ddeeff")]
        assert store.write(group, now=8.0) == [Appended(2, 3), Appended(3, 6)]
        assert data_of(store, sid) == b"aabbccddeeff"
        blocks = list(store.read_blocks(sid))
        assert [(b.start, b.num_tokens, b.episode) for b in blocks] == [(0, 2, None), (2, 1, 4), (3, 3, None)]
        row = store.get_session("s")
        assert row is not None and (row.length, row.num_bytes, row.updated_at) == (6, 12, 8.0)

    @pytest.mark.parametrize(
        ("start", "stop", "starts"),
        [(0, None, [0, 2, 3]), (1, 3, [0, 2]), (2, 3, [2]), (4, None, [3]), (3, 3, []), (6, None, []), (0, 0, [])],
    )
    def test_reading_a_range_gives_the_blocks_that_overlap_it(
        self, store: Store, start: int, stop: int | None, starts: Sequence[int]
    ) -> None:
        sid = make(store, "s").sid
        other = make(store, "t").sid
        store.write(
            [Append(sid, 2, b"aa"), Append(other, 9, b"x" * 9), Append(sid, 1, b"b"), Append(sid, 3, b"c" * 3)], now=1
        )
        assert [block.start for block in store.read_blocks(sid, start, stop)] == starts

    def test_a_reader_may_stop_early(self, store: Store) -> None:
        sid = make(store, "s").sid
        store.write([Append(sid, 1, b"a")] * 200, now=1)
        for _ in range(20):
            assert next(store.read_blocks(sid)).start == 0
        assert isinstance(one(store, Append(sid, 1, b"a")), Appended)

    def test_a_large_append_comes_back_whole(self, store: Store) -> None:
        sid = make(store, "s").sid
        data = bytes(range(256)) * 4 * 1000
        assert one(store, Append(sid, 1000, data)) == Appended(0, 1000)
        assert data_of(store, sid) == data
        part = list(store.read_blocks(sid, 700, 701))
        assert len(part) == 1 and part[0].start <= 700 < part[0].start + part[0].num_tokens

    def test_conditions(self, store: Store) -> None:
        sid = make(store, "s", max_tokens=4).sid
        outcomes = store.write(
            [
                Append(sid, 2, b"aa", if_length=0),
                Append(sid, 1, b"b", if_length=0),
                Append(sid, 3, b"ccc"),
                Append(sid, 2, b"dd", if_length=2),
            ],
            now=1,
        )
        assert outcomes[0] == Appended(0, 2) and outcomes[3] == Appended(2, 4)
        assert isinstance(outcomes[1], WrongLength) and outcomes[1].length == 2
        assert isinstance(outcomes[2], SessionFull) and (outcomes[2].length, outcomes[2].max_tokens) == (2, 4)
        assert data_of(store, sid) == b"aadd"

    def test_idempotency(self, store: Store) -> None:
        sid, other = make(store, "s").sid, make(store, "t").sid
        first = Append(sid, 1, b"a", idempotency_key="k", digest=b"1")
        assert one(store, first, now=10) == Appended(0, 1)
        assert one(store, Append(sid, 1, b"b"), now=11) == Appended(1, 2)
        assert one(store, first, now=12) == Appended(0, 1, replayed=True)
        assert isinstance(one(store, Append(sid, 1, b"x", idempotency_key="k", digest=b"2"), now=12), KeyReused)
        assert one(store, Append(other, 1, b"z", idempotency_key="k", digest=b"2"), now=12) == Appended(0, 1)
        twice = [Append(sid, 1, b"c", idempotency_key="l", digest=b"3")] * 2
        assert store.write(twice, now=13) == [Appended(2, 3), Appended(2, 3, replayed=True)]
        refused = Append(sid, 1, b"d", if_length=0, idempotency_key="m", digest=b"4")
        assert isinstance(one(store, refused), WrongLength) and isinstance(one(store, refused), WrongLength)
        late = 10 + IDEMPOTENCY_SECONDS + 1
        assert one(store, first, now=late) == Appended(3, 4)
        assert data_of(store, sid) == b"abca"

    def test_writes_of_a_group_see_the_ones_before(self, store: Store) -> None:
        sid = make(store, "s").sid
        group: list[Write] = [
            Append(sid, 1, b"a", payloads=[b"{}"]),
            UpdateSession(sid, {"x": 1}),
            Append(sid, 1, b"b"),
            DeleteSession(sid),
            Append(sid, 1, b"c"),
            CreateSession(SessionRow("s", {}, 1.0)),
        ]
        outcomes = store.write(group, now=3)
        assert outcomes[0] == Appended(0, 1) and outcomes[2] == Appended(1, 2)
        assert isinstance(outcomes[1], SessionRow) and outcomes[1].length == 1
        assert isinstance(outcomes[3], SessionRow) and outcomes[3].length == 2
        assert isinstance(outcomes[4], NoSuchSession)
        assert isinstance(outcomes[5], SessionRow) and outcomes[5].sid != sid
        assert data_of(store, sid) == b"" and store.read_payload_range(sid, 0, 9) == {}

    def test_payloads(self, store: Store) -> None:
        sid = make(store, "s").sid
        texts = [None if i % 3 == 0 else b'{"i": %d}' % i for i in range(1500)]
        one(store, Append(sid, 5, b"xxxxx"))
        one(store, Append(sid, 1500, b"y" * 1500, payloads=texts))
        expected = {5 + i: text for i, text in enumerate(texts) if text is not None}
        assert store.read_payloads(sid, range(2000)) == expected
        assert store.read_payloads(sid, [7, 3, 6, 99999]) == {6: texts[1], 7: texts[2]}
        assert store.read_payloads(sid, []) == {}
        assert store.read_payload_range(sid, 6, 8) == {6: texts[1], 7: texts[2]}

    def test_listing(self, store: Store) -> None:
        names = ["a", "a%b", "a_b", "aZb", "a~", "b", "B", "."]
        for place, name in enumerate(names):
            make(store, name, labels={"odd": str(place % 2), "q": 'it\'s "ü"'})
        ordered = sorted(names)
        assert [row.id for row in store.list_sessions()] == ordered
        assert [row.id for row in store.list_sessions(after=ordered[2], limit=3)] == ordered[3:6]
        assert [row.id for row in store.list_sessions(prefix="a_")] == ["a_b"]
        assert [row.id for row in store.list_sessions(prefix="a%")] == ["a%b"]
        assert [row.id for row in store.list_sessions(prefix="a")] == [name for name in ordered if name[0] == "a"]
        odd = [row.id for row in store.list_sessions(labels={"odd": "1", "q": 'it\'s "ü"'}, limit=3)]
        assert odd == sorted(names[1::2])[:3]
        assert store.list_sessions(labels={"odd": "2"}) == []

    def test_totals_and_verify(self, store: Store) -> None:
        first, second = make(store, "s").sid, make(store, "t").sid
        store.write([Append(first, 3, b"abcdef"), Append(second, 1, b"gh", payloads=[b"{}"])], now=1)
        totals = store.totals()
        assert (totals.num_sessions, totals.num_tokens, totals.num_bytes) == (2, 4, 8)
        assert list(store.verify()) == []
        store.close()
        store.close()
