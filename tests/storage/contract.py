"""What every store promises, as one class of tests; each backend's test file subclasses it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from storage.base import (
    FIRST_KEY,
    IDEMPOTENCY_SECONDS,
    STAGED,
    AddPayloads,
    Append,
    Appended,
    Block,
    Compact,
    CreateKey,
    CreateSession,
    DeleteKey,
    DeleteModel,
    DeleteSession,
    KeepSketches,
    KeyExists,
    KeyReused,
    KeyRow,
    ModelInUse,
    ModelRow,
    NoSuchKey,
    NoSuchModel,
    NoSuchSession,
    Publish,
    PutModel,
    Quota,
    QuotaExceeded,
    SessionExists,
    SessionFull,
    SessionKey,
    SessionRow,
    SetQuota,
    Store,
    Summary,
    TooManyBytes,
    UpdateSession,
    UseKey,
    Write,
    WriteResult,
    WrongLength,
)
from tests.names import named

NOW = 1_000_000.0
TOKEN_BYTES = 7


def token(value: int) -> bytes:
    """The bytes of one token."""
    return bytes([value % 256] * TOKEN_BYTES)


def write(store: Store, *writes: Write, now: float = NOW) -> list[WriteResult]:
    return store.write(writes, now=now)


def create(store: Store, session_id: str = "a", **values: Any) -> SessionRow:
    row = SessionRow(session_id, values.pop("settings", {"dim": 7, "labels": {}}), created_at=NOW, **values)
    (created,) = write(store, CreateSession(row))
    assert isinstance(created, SessionRow), created
    return created


def append(store: Store, sid: int, num_tokens: int, value: int = 0, **values: Any) -> WriteResult:
    now = values.pop("now", NOW)
    (outcome,) = write(store, Append(sid, num_tokens, token(value) * num_tokens, **values), now=now)
    return outcome


def model(
    store: Store, name: str, data: bytes, version: int, *, num_parts: int = 1, namespace: str = "default", **values: Any
) -> ModelRow:
    """The row of a model whose bytes are kept, in so many parts, but that is not put yet."""
    size = -(-len(data) // num_parts)
    for number in range(num_parts):
        store.add_model_part(version, number, data[number * size : (number + 1) * size])
    return ModelRow(namespace, name, f"hash{version}", values.pop("config", {}), len(data), NOW, version)


def read(store: Store, sid: int) -> bytes:
    return b"".join(block.data for block in store.read_blocks(sid))


def ids(rows: list[SessionRow]) -> list[str]:
    return [row.id for row in rows]


class StoreContract:
    """Subclasses give `store`."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        raise NotImplementedError

    # --- sessions ---

    def test_a_created_session_is_found_as_it_was_given(self, store: Store) -> None:
        settings = {"dim": 7, "labels": {"agent": "ünïcode \"quoted\" 'twice'"}, "scale": 0.1, "none": None, "l": [1]}
        created = create(store, "a", settings=settings, max_tokens=13)
        assert created.sid > 0
        assert created == replace(created, settings=settings, max_tokens=13, length=0, num_bytes=0, updated_at=NOW)
        assert store.get_session(named("a")) == created
        assert store.get_session(named("A")) is None

    def test_an_id_is_taken_once(self, store: Store) -> None:
        created = create(store)
        (outcome,) = write(store, CreateSession(SessionRow("a", {"dim": 11}, NOW)))
        assert isinstance(outcome, SessionExists)
        assert store.get_session(named("a")) == created

    def test_a_sid_is_never_used_again(self, store: Store) -> None:
        first = create(store)
        write(store, DeleteSession(first.sid))
        second = create(store)
        assert second.sid != first.sid
        assert isinstance(append(store, first.sid, 1), NoSuchSession)
        assert read(store, second.sid) == b""

    def test_settings_are_replaced_and_nothing_else(self, store: Store) -> None:
        created = create(store, max_tokens=13)
        append(store, created.sid, 2, now=NOW + 5)
        (updated,) = write(store, UpdateSession(created.sid, {"labels": {"k": "v"}}), now=NOW + 9)
        num_bytes = 2 * TOKEN_BYTES
        expected = replace(created, settings={"labels": {"k": "v"}}, length=2, num_bytes=num_bytes, updated_at=NOW + 5)
        assert updated == expected == store.get_session(named("a"))

    def test_a_deleted_session_leaves_nothing(self, store: Store) -> None:
        created = create(store)
        append(store, created.sid, 2, payloads=[b"{}", b"{}"], idempotency_key="k", digest=b"d")
        deleted = store.get_session(named("a"))
        assert write(store, DeleteSession(created.sid)) == [deleted]
        assert store.get_session(named("a")) is None
        assert list(store.read_blocks(created.sid)) == []
        assert store.read_payload_range(created.sid, 0, 10) == {}
        assert store.totals().num_sessions == store.totals().num_tokens == store.totals().num_bytes == 0
        again, unknown = write(store, DeleteSession(created.sid), UpdateSession(created.sid, {}))
        assert isinstance(again, NoSuchSession) and isinstance(unknown, NoSuchSession)

    def test_a_long_session_is_gone_at_once_and_its_bytes_by_and_by(self, store: Store) -> None:
        """So that nobody else waits for it: no step deletes many rows."""
        large, small = create(store, "large").sid, create(store, "small").sid
        for first in range(0, 1_601, 400):
            some = range(first, min(first + 400, 1_601))
            write(store, *(Append(large, 1, token(n), [b"{}"], idempotency_key=str(n), digest=b"d") for n in some))
        write(store, Compact(large, Summary(0, 3, b"three"), 5))
        append(store, small, 1)
        write(store, DeleteSession(large))
        again = create(store, "large").sid
        num_steps = 0
        while True:
            assert (read(store, large), list(store.read_summaries(large))) == (b"", [])
            assert store.read_payloads(large, [0, 300]) == store.read_payload_range(large, 0, 1_601) == {}
            assert store.read_episodes(large, 1_601) == []
            assert list(store.verify()) == []
            assert append(store, again, 1) == Appended(num_steps, num_steps + 1)
            if not store.purge():
                break
            num_steps += 1
        assert (num_steps > 1) == store.durable
        assert not store.purge() and not store.purge(large) and not store.give_back()
        assert read(store, small) == token(0)

    def test_one_deleted_session_can_be_purged_before_the_others(self, store: Store) -> None:
        sids = [create(store, id_).sid for id_ in ("a", "b")]
        for sid in sids:
            write(store, *(Append(sid, 9, token(value) * 9, [b"{}"] * 9) for value in range(131)))
            write(store, DeleteSession(sid))
        while store.purge(sids[1]):
            pass
        assert store.purge(sids[0]) == store.durable

    # --- lists ---

    ODD_IDS = (
        "",
        "a",
        "a%",
        "a%b",
        "a_b",
        "a*",
        "ab",
        "b'\"",
        "é",
        "\ud7ff",
        "\ue000",
        "\uffff",
        "\U00010000",
        "\U0010ffff",
    )

    def test_ids_are_listed_by_code_point(self, store: Store) -> None:
        for session_id in reversed(self.ODD_IDS[1:]):
            create(store, session_id)
        assert ids(store.list_sessions()) == sorted(self.ODD_IDS[1:])

    @pytest.mark.parametrize("prefix", [*ODD_IDS, "aZ", "a\U0010ffff", "\U0010ffff\U0010ffff"])
    def test_a_prefix_is_taken_literally(self, store: Store, prefix: str) -> None:
        everything = [*self.ODD_IDS[1:], *(id_ + "x" for id_ in self.ODD_IDS[1:]), "a\U0010ffff1"]
        write(store, *(CreateSession(SessionRow(id_, {}, NOW)) for id_ in everything))
        assert ids(store.list_sessions(prefix=prefix)) == sorted(id_ for id_ in everything if id_.startswith(prefix))

    def test_a_list_goes_on_after_an_id(self, store: Store) -> None:
        everything = [f"s{number:02}" for number in range(23)]
        write(store, *(CreateSession(SessionRow(id_, {}, NOW)) for id_ in everything))
        found: list[str] = []
        while page := store.list_sessions(prefix="s", after=named(found[-1]) if found else FIRST_KEY, limit=5):
            assert len(page) <= 5
            found += ids(page)
        assert found == everything
        assert store.list_sessions(limit=0) == []

    def test_an_id_is_free_in_another_namespace(self, store: Store) -> None:
        ours, theirs = create(store, "a"), create(store, "a", namespace="theirs")
        assert ours.key == SessionKey("default", "a") and theirs.key == SessionKey("theirs", "a")
        (outcome,) = write(store, CreateSession(SessionRow("a", {}, NOW, namespace="theirs")))
        assert isinstance(outcome, SessionExists)
        append(store, ours.sid, 3, 1)
        append(store, theirs.sid, 2, 2)
        assert read(store, ours.sid) == token(1) * 3 and read(store, theirs.sid) == token(2) * 2
        write(store, DeleteSession(ours.sid))
        assert store.get_session(ours.key) is None and store.get_session(theirs.key) is not None
        assert store.get_session(SessionKey("other", "a")) is None

    def test_sessions_are_listed_and_counted_by_namespace(self, store: Store) -> None:
        for namespace in ("default", "C", "a", "z"):
            for id_ in ("b", "a", "c"):
                row = create(store, id_, namespace=namespace, settings={"labels": {"of": namespace}})
                append(store, row.sid, 5)
        assert [row.key for row in store.list_sessions(after=SessionKey("a", "b"), limit=3)] == [
            ("a", "c"),
            ("default", "a"),
            ("default", "b"),
        ]
        assert {row.namespace for row in store.list_sessions("a")} == {"a"}
        assert ids(store.list_sessions("a", after=SessionKey("a", "a"), limit=1)) == ["b"]
        assert [row.key for row in store.list_sessions("z", prefix="c")] == [("z", "c")]
        assert store.list_sessions("z", labels={"of": "a"}) == [] == store.list_sessions("nobody")
        totals = store.totals("z")
        assert (totals.num_sessions, totals.num_tokens) == (3, 15)
        assert (totals.num_bytes, totals.num_disk_bytes) == (15 * TOKEN_BYTES, 0)
        assert store.totals("nobody").num_sessions == 0 and store.totals().num_tokens == 60

    def test_keys_are_made_used_and_taken_back(self, store: Store) -> None:
        first = KeyRow("default", "a", b"1" * 32, "admin", NOW)
        second = KeyRow("C", "a", b"2" * 32, "read", NOW, expires_at=NOW + 7, requests_per_second=0.5)
        again = replace(first, digest=b"3" * 32)
        made, other, refused = write(store, CreateKey(first), CreateKey(second), CreateKey(again))
        assert (made, other) == (first, second) and isinstance(refused, KeyExists)
        assert store.list_keys() == [second, first]
        used, missing = write(store, UseKey("default", "a", NOW + 3), UseKey("default", "b", NOW + 3))
        assert used == replace(first, last_used_at=NOW + 3) and isinstance(missing, NoSuchKey)
        deleted, missing = write(store, DeleteKey("default", "a"), DeleteKey("default", "a"))
        assert deleted == used and isinstance(missing, NoSuchKey)
        assert store.list_keys() == [second]

    # --- models ---

    def test_a_model_is_its_name_and_bytes(self, store: Store) -> None:
        first, second = (
            model(store, "m", b"1" * 11, 1),
            model(store, "m", b"2" * 13, 2, namespace="C", config={"dim": 3}),
        )
        assert write(store, PutModel(first, {}), PutModel(second, {})) == [first, second]
        assert store.list_models() == [second, first]
        assert store.read_model(first) == b"1" * 11 and store.read_model(second) == b"2" * 13
        assert store.totals("C").num_model_bytes == 13 and store.totals().num_model_bytes == 24
        gone, missing = write(store, DeleteModel("C", "m"), DeleteModel("C", "m"))
        assert gone == second and isinstance(missing, NoSuchModel)
        assert store.list_models() == [first] and list(store.verify()) == []

    def test_a_model_of_several_parts_is_swapped_whole_and_the_old_bytes_go_by_and_by(self, store: Store) -> None:
        """An upload that is under way, and one that nobody finished, are nobody's model; the one under way stays."""
        old = model(store, "m", b"old" * 100, 1, num_parts=7)
        write(store, PutModel(old, {}))
        new = model(store, "m", b"new" * 100, 2, num_parts=7)
        store.add_model_part(3, 0, b"of an upload that never ended")
        assert store.list_models() == [old] and store.read_model(old) == b"old" * 100
        while store.purge_models([2]):
            pass
        assert write(store, PutModel(new, {})) == [new]
        num_steps = 1
        while store.purge_models():
            num_steps += 1
        assert num_steps < 20
        assert store.read_model(old) is None and store.read_model(replace(old, version=3)) is None
        assert store.read_model(new) == b"new" * 100 and list(store.verify()) == []

    def test_a_model_fits_the_sessions_that_name_it(self, store: Store) -> None:
        """Those of its own namespace; of one that all may use, also those of namespaces without one of this name."""
        for id_, namespace, dim in (("a", "default", 7), ("b", "default", 7), ("c", "C", 7), ("d", "D", 9)):
            create(store, id_, settings={"dim": dim, "chunk_size": 3, "model": "m"}, namespace=namespace)
        create(store, "other", settings={"dim": 5, "model": "n"})
        create(store, "none", settings={"dim": 5})
        assert store.count_sessions("default") == {"m": 2, "n": 1} and store.count_sessions("default", "m") == {"m": 2}
        assert store.count_sessions("nobody") == store.count_sessions("default", "o") == {}
        ours, theirs, all_ = (
            model(store, "m", b"x", n, namespace=of) for n, of in enumerate(("default", "D", "shared"))
        )
        seven, nine = {"dim": 7, "chunk_size": 3}, {"dim": 9}
        refused, put = write(store, PutModel(ours, nine), PutModel(ours, seven))
        assert isinstance(refused, ModelInUse) and put == ours
        assert str(refused) == "its dim would be 9, and a session that names it has 7"
        refused, put = write(store, PutModel(all_, seven, everywhere=True), PutModel(theirs, nine))
        assert isinstance(refused, ModelInUse) and put == theirs
        assert write(store, PutModel(all_, seven, everywhere=True)) == [all_], "D has its own now"
        for gone in (DeleteModel("default", "m"), DeleteModel("shared", "m", everywhere=True)):
            assert isinstance(write(store, gone)[0], ModelInUse)
        (c,) = store.list_sessions("C")
        write(store, UpdateSession(c.sid, {"dim": 7, "model": "n"}))
        assert store.count_sessions("C") == {"n": 1}
        assert write(store, DeleteModel("shared", "m", everywhere=True)) == [all_]

    def test_models_count_in_a_quota(self, store: Store) -> None:
        write(store, SetQuota(Quota("default", max_bytes=2 * TOKEN_BYTES)))
        small, large = model(store, "m", b"s" * TOKEN_BYTES, 1), model(store, "m", b"l" * 3 * TOKEN_BYTES, 2)
        put, refused = write(store, PutModel(small, {}), PutModel(large, {}))
        assert put == small and isinstance(refused, QuotaExceeded)
        sid = create(store).sid
        assert isinstance(append(store, sid, 1), Appended) and isinstance(append(store, sid, 1), QuotaExceeded)
        write(store, DeleteModel("default", "m"))
        assert isinstance(append(store, sid, 1), Appended)

    def test_a_namespace_holds_no_more_than_its_quota(self, store: Store) -> None:
        """Within a group and over groups, with what deletions and trims give back; another is not affected."""
        ours = create(store, "a", namespace="ours")
        append(store, ours.sid, 3)
        quota = Quota("ours", max_sessions=2, max_tokens=10)
        assert store.get_quota("ours") == Quota("ours") and write(store, SetQuota(quota)) == [quota]
        assert store.get_quota("ours") == quota and store.get_quota("default") == Quota("default")
        second, third = (CreateSession(SessionRow(id_, {}, NOW, namespace="ours")) for id_ in "bc")
        made, refused = write(store, second, third)
        assert isinstance(made, SessionRow) and isinstance(refused, QuotaExceeded)
        assert str(refused) == "the namespace would hold 3 sessions, its quota is 2"
        sids = (ours.sid, made.sid)
        outcomes = write(store, *(Append(sids[number % 2], 2, token(1) * 2) for number in range(5)))
        assert [isinstance(outcome, Appended) for outcome in outcomes] == [True] * 3 + [False] * 2
        assert isinstance(append(store, ours.sid, 2), QuotaExceeded) and isinstance(
            append(store, made.sid, 1), Appended
        )
        deleted, again, created = write(store, DeleteSession(ours.sid), Append(made.sid, 7, token(2) * 7), third)
        assert isinstance(deleted, SessionRow) and isinstance(again, Appended) and isinstance(created, SessionRow)
        assert store.totals("ours").num_tokens == 10
        assert isinstance(append(store, create(store).sid, 99), Appended)
        write(store, SetQuota(Quota("ours", max_bytes=13 * TOKEN_BYTES)))
        assert isinstance(append(store, created.sid, 3), Appended) and isinstance(
            append(store, made.sid, 1), QuotaExceeded
        )
        write(store, SetQuota(Quota("ours")))
        assert isinstance(append(store, made.sid, 50), Appended)

    def test_what_trims_itself_stays_within_a_quota(self, store: Store) -> None:
        row = create(store, "a", max_tokens=6)
        write(store, SetQuota(Quota("default", max_tokens=6, max_bytes=8 * TOKEN_BYTES)))
        for number in range(23):
            outcome = append(store, row.sid, 1, number, trim_chunk=3)
            assert isinstance(outcome, Appended), outcome
        assert store.totals("default").num_tokens <= 6
        assert isinstance(append(store, create(store, "b").sid, 7), QuotaExceeded)

    def test_labels_must_all_be_there(self, store: Store) -> None:
        odd = 'it\'s "odd" %_*\\ \0 /ключ'
        create(store, "one", settings={"labels": {"kind": "x", odd: odd}})
        create(store, "two", settings={"labels": {"kind": "x"}})
        create(store, "none", settings={})
        assert ids(store.list_sessions(labels={"kind": "x"})) == ["one", "two"]
        assert ids(store.list_sessions(labels={"kind": "x"}, limit=1, after=named("one"))) == ["two"]
        assert ids(store.list_sessions(labels={odd: odd, "kind": "x"})) == ["one"]
        assert ids(store.list_sessions(labels={"kind": "X"})) == []
        assert ids(store.list_sessions(labels={})) == ["none", "one", "two"]

    # --- appends ---

    def test_appends_follow_each_other(self, store: Store) -> None:
        sid = create(store).sid
        assert append(store, sid, 2, 1) == Appended(0, 2)
        assert append(store, sid, 1, 2, now=NOW + 3) == Appended(2, 3)
        assert read(store, sid) == token(1) * 2 + token(2)
        row = store.get_session(named("a"))
        assert row is not None and (row.length, row.num_bytes, row.updated_at) == (3, 3 * TOKEN_BYTES, NOW + 3)

    def test_if_length_must_be_the_length(self, store: Store) -> None:
        sid = create(store).sid
        assert append(store, sid, 2, if_length=0) == Appended(0, 2)
        refused = append(store, sid, 1, if_length=0)
        assert isinstance(refused, WrongLength) and refused.length == 2
        assert append(store, sid, 1, if_length=2) == Appended(2, 3)

    def test_max_tokens_is_never_passed(self, store: Store) -> None:
        sid = create(store, max_tokens=3).sid
        refused = append(store, sid, 4)
        assert isinstance(refused, SessionFull) and (refused.length, refused.max_tokens) == (0, 3)
        assert append(store, sid, 3) == Appended(0, 3)
        assert isinstance(append(store, sid, 1), SessionFull)
        assert store.totals().num_tokens == 3

    def test_one_refused_write_leaves_the_others(self, store: Store) -> None:
        sid, other = create(store).sid, create(store, "b").sid
        outcomes = write(
            store,
            Append(sid, 1, token(1)),
            Append(10**9, 1, token(2), payloads=[b"{}"]),
            Append(sid, 1, token(3), if_length=7, payloads=[b"{}"]),
            Append(other, 1, token(4)),
            CreateSession(SessionRow("a", {}, NOW)),
            Append(sid, 1, token(5)),
        )
        assert [type(outcome) for outcome in outcomes] == [
            Appended, NoSuchSession, WrongLength, Appended, SessionExists, Appended,
        ]  # fmt: skip
        assert read(store, sid) == token(1) + token(5)
        assert read(store, other) == token(4)
        assert store.read_payload_range(sid, 0, 10) == {}

    def test_a_group_sees_its_own_writes_in_order(self, store: Store) -> None:
        sid = create(store).sid
        outcomes = write(
            store,
            Append(sid, 1, token(1), payloads=[b"1"], idempotency_key="k", digest=b"d"),
            UpdateSession(sid, {"n": 1}),
            Append(sid, 1, token(2), if_length=1),
            DeleteSession(sid),
            Append(sid, 1, token(3)),
            CreateSession(SessionRow("a", {"n": 2}, NOW)),
            CreateSession(SessionRow("a", {"n": 3}, NOW)),
        )
        _, updated, second, deleted, late, created, exists = outcomes
        assert isinstance(updated, SessionRow) and updated.length == 1
        assert second == Appended(1, 2)
        assert isinstance(deleted, SessionRow) and (deleted.length, deleted.settings) == (2, {"n": 1})
        assert isinstance(late, NoSuchSession) and isinstance(exists, SessionExists)
        assert isinstance(created, SessionRow) and created == store.get_session(named("a"))
        assert read(store, created.sid) == b"" and store.totals().num_bytes == 0

    def test_a_large_group_is_one_group(self, store: Store) -> None:
        """More sessions and keys than a statement may have parameters."""
        created = write(store, *(CreateSession(SessionRow(f"s{n}", {}, NOW)) for n in range(1_201)))
        sids = [row.sid for row in created if isinstance(row, SessionRow)]
        appends = [Append(sid, 1, token(sid), idempotency_key=f"k{sid}", digest=b"d") for sid in sids]
        assert write(store, *appends) == [Appended(0, 1)] * 1_201
        assert write(store, *appends) == [Appended(0, 1, replayed=True)] * 1_201
        assert store.totals().num_tokens == 1_201

    def test_an_empty_group_is_nothing(self, store: Store) -> None:
        assert store.write([], now=NOW) == []

    # --- idempotency keys ---

    def test_a_key_that_comes_again_gets_the_first_answer(self, store: Store) -> None:
        sid, other = create(store).sid, create(store, "b").sid
        key: dict[str, Any] = {"idempotency_key": "ключ'\"", "digest": b"d"}
        assert append(store, sid, 2, **key) == Appended(0, 2)
        assert append(store, sid, 1) == Appended(2, 3)
        assert append(store, sid, 2, **key, if_length=0) == Appended(0, 2, replayed=True)
        assert append(store, other, 2, **key) == Appended(0, 2), "a key belongs to its session"
        assert isinstance(append(store, sid, 2, idempotency_key="ключ'\"", digest=b"e"), KeyReused)
        assert store.totals().num_tokens == 5

    def test_a_key_may_come_twice_in_one_group(self, store: Store) -> None:
        sid = create(store).sid
        first = Append(sid, 1, token(1), idempotency_key="k", digest=b"d")
        one, again, reused = write(store, first, first, first._replace(digest=b"e"))
        assert (one, again) == (Appended(0, 1), Appended(0, 1, replayed=True))
        assert isinstance(reused, KeyReused)
        assert store.totals().num_tokens == 1

    def test_a_refused_append_does_not_use_up_its_key(self, store: Store) -> None:
        sid = create(store).sid
        assert isinstance(append(store, sid, 1, if_length=5, idempotency_key="k", digest=b"d"), WrongLength)
        assert append(store, sid, 1, idempotency_key="k", digest=b"e") == Appended(0, 1)

    def test_a_key_is_forgotten_after_its_time(self, store: Store) -> None:
        sid = create(store).sid
        key: dict[str, Any] = {"idempotency_key": "k", "digest": b"d"}
        assert append(store, sid, 1, **key) == Appended(0, 1)
        just_before = NOW + IDEMPOTENCY_SECONDS - 1
        assert append(store, sid, 1, **key, now=just_before) == Appended(0, 1, replayed=True)
        assert append(store, sid, 1, **key, now=NOW + IDEMPOTENCY_SECONDS) == Appended(1, 2)
        assert append(store, sid, 1, **key, now=NOW + IDEMPOTENCY_SECONDS + 1) == Appended(1, 2, replayed=True)

    def test_more_keys_expire_than_one_group_purges(self, store: Store) -> None:
        sid = create(store).sid
        appends = [Append(sid, 1, token(n), idempotency_key=f"k{n:04}", digest=b"d") for n in range(701)]
        write(store, *appends)
        late = write(store, *appends, now=NOW + IDEMPOTENCY_SECONDS)
        assert late == [Appended(701 + n, 702 + n) for n in range(701)]

    # --- reads ---

    @pytest.mark.parametrize(
        ("start", "stop", "expected"),
        [
            (0, None, [0, 2, 5]), (1, None, [0, 2, 5]), (2, None, [2, 5]), (4, 5, [2]), (4, 6, [2, 5]), (0, 2, [0]),
            (0, 0, []), (3, 3, []), (6, None, []), (100, 200, []), (5, 100, [5]), (-5, 1, [0]),
        ],
    )  # fmt: skip
    def test_blocks_that_overlap_come_whole(
        self, store: Store, start: int, stop: int | None, expected: list[int]
    ) -> None:
        sid = create(store).sid
        everything = {0: Block(0, 2, token(1) * 2), 2: Block(2, 3, token(2) * 3, 11), 5: Block(5, 1, token(3), -1)}
        for block in everything.values():
            append(store, sid, block.num_tokens, block.data[0], episode=block.episode)
        assert list(store.read_blocks(sid, start, stop)) == [everything[start] for start in expected]

    def test_a_long_append_may_come_in_parts_and_comes_in_order(self, store: Store) -> None:
        sid = create(store).sid
        data = b"".join(bytes([n % 251]) * 4_099 for n in range(211))
        assert write(store, Append(sid, 211, data, episode=3)) == [Appended(0, 211)]
        expected = 0
        for block in store.read_blocks(sid):
            assert (block.start, block.episode) == (expected, 3)
            assert block.data == data[block.start * 4_099 : (block.start + block.num_tokens) * 4_099]
            expected += block.num_tokens
        assert expected == 211
        assert any(block.start <= 100 < block.start + block.num_tokens for block in store.read_blocks(sid, 100, 101))

    def test_a_read_sees_the_moment_it_began(self, store: Store) -> None:
        sid = create(store).sid
        for value in range(101):
            append(store, sid, 1, value)
        blocks = store.read_blocks(sid)
        first = next(blocks)
        append(store, sid, 1, 255)
        write(store, DeleteSession(sid))
        assert first.data + b"".join(block.data for block in blocks) == b"".join(map(token, range(101)))
        assert list(store.read_blocks(sid)) == []

    def test_many_reads_may_be_begun_and_left(self, store: Store) -> None:
        sid = create(store).sid
        for value in range(101):
            append(store, sid, 1, value)
        begun = [store.read_blocks(sid) for _ in range(31)]
        assert {next(blocks).start for blocks in begun} == {0}
        del begun
        for _ in range(101):
            next(store.read_blocks(sid))

    def test_payloads_are_found_where_they_were_given(self, store: Store) -> None:
        sid, other = create(store).sid, create(store, "b").sid
        append(store, sid, 3, payloads=[b'{"n": 0}', None, b"\xff\x00'"])
        append(store, sid, 1)
        append(store, sid, 1, payloads=[b""])
        append(store, other, 1, payloads=[b"other"])
        assert store.read_payloads(sid, [0, 1, 2, 3, 4, 5, 2, -1]) == {0: b'{"n": 0}', 2: b"\xff\x00'", 4: b""}
        assert store.read_payloads(sid, []) == store.read_payloads(sid + 99, [0]) == {}
        assert store.read_payloads(sid, range(5_003)).keys() == {0, 2, 4}
        each = store.read_payloads_each([(sid, [0, 2], 99), (sid + 99, [0], 99), (other, [0, 7], 5), (sid, [0], 3)])
        assert each[:3] == [{0: b'{"n": 0}', 2: b"\xff\x00'"}, {}, {0: b"other"}]
        assert isinstance(each[3], TooManyBytes) and store.read_payloads_each([]) == []
        assert store.read_payload_range(sid, 1, 4) == {2: b"\xff\x00'"}
        assert store.read_payload_range(sid, -3, 10**12).keys() == {0, 2, 4}
        assert store.read_payload_range(sid, 3, 2) == {}

    def test_totals_add_up(self, store: Store) -> None:
        sids = [create(store, id_).sid for id_ in ("a", "b", "c")]
        for count, sid in enumerate(sids):
            if count:
                append(store, sid, count)
        totals = store.totals()
        assert (totals.num_sessions, totals.num_tokens, totals.num_bytes) == (3, 3, 3 * TOKEN_BYTES)
        assert (totals.num_disk_bytes > 0) == store.durable

    def test_a_sound_store_has_no_problems(self, store: Store) -> None:
        sid = create(store).sid
        append(store, sid, 3, payloads=[b"{}", None, b"{}"], idempotency_key="k", digest=b"d")
        append(store, sid, 2)
        assert list(store.verify()) == []

    def test_reading_while_writing_sees_whole_groups(self, store: Store) -> None:
        """Each group adds one token to both sessions, so a reader finds the numbers of tokens of whole groups."""
        sids = [create(store, id_).sid for id_ in ("a", "b")]
        done, wrong = threading.Event(), list[str]()

        def look() -> None:
            while not done.is_set():
                lengths = {row.length for row in store.list_sessions()}
                tokens = read(store, sids[1])
                if len(lengths) != 1 or tokens != b"".join(token(n) for n in range(len(tokens) // TOKEN_BYTES)):
                    wrong.append(f"{lengths}, {len(tokens)} bytes")

        readers = [threading.Thread(target=look) for _ in range(3)]
        for reader in readers:
            reader.start()
        for value in range(67):
            write(store, *(Append(sid, 1, token(value)) for sid in sids))
        done.set()
        for reader in readers:
            reader.join()
        assert wrong == [] and math.prod(row.length for row in store.list_sessions()) == 67**2

    def test_closing_twice_is_closing(self, store: Store) -> None:
        store.close()
        store.close()

    # --- many ranges, episodes, compaction ---

    def test_many_ranges_are_read_as_one_by_one(self, store: Store) -> None:
        first, second = create(store, "a"), create(store, "b")
        for number in range(11):
            append(store, first.sid, 1 + number % 3, value=number)
            append(store, second.sid, 2, value=100 + number)
        ranges = [(first.sid, 3, 9), (second.sid, 0, 1), (first.sid, 0, 2), (second.sid, 5, 5), (second.sid, 5, 99)]
        expected = [(place, block) for place, asked in enumerate(ranges) for block in store.read_blocks(*asked)]
        assert list(store.read_ranges(ranges)) == expected
        assert {place for place, _ in expected} == {0, 1, 2, 4}

    def test_episodes_are_told_where_they_change(self, store: Store) -> None:
        created = create(store)
        for episode in (None, None, 7, 7, 7, None, 3, 7):
            append(store, created.sid, 2, episode=episode)
        assert store.read_episodes(created.sid, 99) == [(0, None), (4, 7), (10, None), (12, 3), (14, 7)]
        assert store.read_episodes(created.sid, 12) == [(0, None), (4, 7), (10, None)]
        assert store.read_episodes(created.sid, 0) == []
        assert store.read_episodes(created.sid + 1, 99) == []

    def test_sealing_keeps_summaries_and_changes_no_token(self, store: Store) -> None:
        created = create(store)
        for number in range(41):
            append(store, created.sid, 1, value=number, episode=number // 17, payloads=[b"{}"])
        before = read(store, created.sid)
        row = store.get_session(named("a"))
        assert write(store, Compact(created.sid, Summary(0, 3, b"three"), 5)) == [row]
        assert write(store, Compact(created.sid, Summary(3, 4, b"more"), 5)) == [row]
        assert list(store.read_summaries(created.sid)) == [Summary(0, 3, b"three"), Summary(3, 4, b"more")]
        assert read(store, created.sid) == before
        assert store.read_episodes(created.sid, 41) == [(0, 0), (17, 1), (34, 2)]
        assert len(store.read_payload_range(created.sid, 0, 41)) == 41
        assert list(store.verify()) == []

    def test_summaries_follow_each_other(self, store: Store) -> None:
        created = create(store)
        append(store, created.sid, 23)
        (refused,) = write(store, Compact(created.sid, Summary(1, 1, b"x"), 5))
        assert isinstance(refused, WrongLength) and refused.length == 0
        write(store, Compact(created.sid, Summary(0, 2, b"x"), 5))
        for first in (0, 1, 3):
            (refused,) = write(store, Compact(created.sid, Summary(first, 1, b"y"), 5))
            assert isinstance(refused, WrongLength) and refused.length == 2
        assert list(store.read_summaries(created.sid)) == [Summary(0, 2, b"x")]
        assert isinstance(write(store, Compact(created.sid + 1, Summary(0, 1, b"x"), 5))[0], NoSuchSession)
        write(store, DeleteSession(created.sid))
        assert list(store.read_summaries(created.sid)) == []

    def test_sketches_take_the_place_of_those_of_the_same_chunks(self, store: Store) -> None:
        """In any order, with gaps, of another version too; nothing else changes."""
        created = create(store)
        append(store, created.sid, 53)
        row, before = store.get_session(named("a")), read(store, created.sid)

        def keep(first: int, data: bytes, version: int = 2) -> None:
            write_ = KeepSketches(created.sid, Summary(first, len(data) // 2, data), 5, version)
            assert write(store, write_) == [row]

        def kept(version: int = 2) -> list[tuple[int, bytes]]:
            return [(one.first, one.data) for one in store.read_sketches(created.sid, version)]

        assert kept() == []
        keep(6, b"6677")
        keep(0, b"00112233")
        assert kept() == [(0, b"00112233"), (6, b"6677")] and kept(1) == kept(3) == []
        keep(1, b"xxyy", version=3)
        assert kept() == [(0, b"00"), (3, b"33"), (6, b"6677")] and kept(3) == [(1, b"xxyy")]
        keep(2, b"223344556677")
        assert kept() == [(0, b"00"), (2, b"223344556677")] and kept(3) == [(1, b"xx")]
        assert read(store, created.sid) == before and list(store.read_summaries(created.sid)) == []
        assert list(store.verify()) == []
        (refused,) = write(store, KeepSketches(created.sid + 1, Summary(0, 1, b"x"), 5, 2))
        assert isinstance(refused, NoSuchSession) and list(store.read_sketches(created.sid + 1, 2)) == []
        write(store, DeleteSession(created.sid))
        assert kept() == kept(3) == []

    # --- trimming ---

    def test_the_oldest_whole_chunks_make_room(self, store: Store) -> None:
        sid = create(store, max_tokens=13).sid
        for start in range(0, 60, 4):
            answer = append(store, sid, 4, start, payloads=[b"%d" % n for n in range(start, start + 4)], trim_chunk=5)
            first = max(0, -(-(start + 4 - 13) // 5) * 5)
            assert answer == Appended(start, start + 4, first_position=first)
            row = store.get_session(named("a"))
            assert row is not None and (row.first_position, row.length) == (first, start + 4)
            blocks = list(store.read_blocks(sid))
            assert blocks[0].start == first, "a block of which a part was trimmed is cut"
            assert b"".join(block.data for block in blocks) == b"".join(
                token(n // 4 * 4) for n in range(first, start + 4)
            )
            assert row.num_bytes == sum(len(block.data) for block in blocks)
            assert store.read_payload_range(sid, 0, 99) == {n: b"%d" % n for n in range(first, start + 4)}
            assert store.totals().num_tokens == start + 4 - first
            assert list(store.verify()) == []

    def test_what_does_not_fit_is_refused_and_trims_nothing(self, store: Store) -> None:
        """An append would have to trim itself, or a chunk that is not full."""
        sid = create(store, max_tokens=13).sid
        append(store, sid, 13, trim_chunk=5)
        for num_tokens, chunk_size in ((14, 5), (12, 5), (1, None), (1, 17)):
            assert isinstance(append(store, sid, num_tokens, trim_chunk=chunk_size), SessionFull)
        assert append(store, sid, 9, trim_chunk=5) == Appended(13, 22, first_position=10)
        assert isinstance(append(store, sid, 9, trim_chunk=5, if_length=21), WrongLength)
        row = store.get_session(named("a"))
        assert row is not None and (row.first_position, row.length) == (10, 22)

    def test_one_group_may_trim_what_it_brought(self, store: Store) -> None:
        sid = create(store, max_tokens=7).sid
        group = [Append(sid, 3, token(n) * 3, payloads=[b"{}"] * 3, trim_chunk=2) for n in range(9)]
        outcomes = write(store, *group)
        assert outcomes[-1] == Appended(24, 27, first_position=20)
        assert [block.start for block in store.read_blocks(sid)] == [20, 21, 24]
        assert store.read_payload_range(sid, 0, 99).keys() == set(range(20, 27))
        assert list(store.verify()) == []
        assert write(store, DeleteSession(sid)) and store.totals().num_bytes == 0

    def test_episodes_and_summaries_of_a_session_that_trims(self, store: Store) -> None:
        """Summaries begin with the session; one of which a part was trimmed is cut."""
        sid = create(store, max_tokens=20).sid
        for number in range(5):
            append(store, sid, 4, number, trim_chunk=2, episode=(None, None, 3, 3, 5)[number])
        write(store, Compact(sid, Summary(0, 3, b"001122"), 2), Compact(sid, Summary(3, 2, b"3344"), 2))
        append(store, sid, 7, 9, trim_chunk=2, episode=5)
        assert list(store.read_summaries(sid)) == [Summary(4, 1, b"44")]
        write(store, KeepSketches(sid, Summary(3, 3, b"abc"), 2, 1))
        assert list(store.read_sketches(sid, 1)) == [Summary(4, 2, b"bc")]
        assert store.read_episodes(sid, 99) == [(8, 3), (16, 5)]
        assert store.read_episodes(sid, 9) == [(8, 3)]
        append(store, sid, 3, 9, trim_chunk=2)
        assert list(store.read_sketches(sid, 1)) == [Summary(5, 1, b"c")]
        append(store, sid, 10, 9, trim_chunk=2)
        assert list(store.read_sketches(sid, 1)) == []
        assert list(store.read_summaries(sid)) == [] and store.read_episodes(sid, 99) == [(20, 5), (27, None)]
        (refused,) = write(store, Compact(sid, Summary(5, 3, b"x"), 2))
        assert isinstance(refused, WrongLength) and refused.length == 10
        (row,) = write(store, Compact(sid, Summary(10, 3, b"x"), 2))
        assert row == store.get_session(named("a"))
        assert list(store.read_summaries(sid)) == [Summary(10, 3, b"x")]
        assert list(store.verify()) == []

    # --- staged sessions ---

    def test_a_staged_session_is_nowhere_until_it_is_published(self, store: Store) -> None:
        """Not listed, not counted; then whole, at once, from where it begins."""
        write(store, SetQuota(Quota("default", max_sessions=1)))
        staged = stage(store, first_position=6)
        assert (staged.first_position, staged.length) == (6, 6)
        assert append(store, staged.sid, 3, 5, if_length=6) == Appended(6, 9, first_position=6)
        (told,) = write(store, AddPayloads(staged.sid, 6, [b"{}", None, b'{"n":8}']))
        assert isinstance(told, SessionRow) and told.length == 9
        assert store.list_sessions() == [] == store.list_sessions("default")
        assert store.totals() == replace(store.totals(), num_sessions=0, num_tokens=0, num_bytes=0)
        assert ids(store.list_sessions(STAGED)) == ["stage"]
        row = SessionRow("a", {"dim": 7, "labels": {"k": "v"}}, NOW + 1, max_tokens=13, updated_at=NOW + 2)
        (published,) = write(store, Publish(staged.sid, row))
        expected = replace(row, sid=staged.sid, first_position=6, length=9, num_bytes=3 * TOKEN_BYTES)
        assert published == expected == store.get_session(named("a"))
        assert store.list_sessions() == [expected] and store.list_sessions(STAGED) == []
        assert read(store, staged.sid) == token(5) * 3
        assert store.read_payload_range(staged.sid, 0, 9) == {6: b"{}", 8: b'{"n":8}'}
        assert store.totals("default").num_tokens == 3
        assert isinstance(append(store, staged.sid, 11), SessionFull), "its max_tokens counts from now on"
        assert isinstance(write(store, CreateSession(SessionRow("b", {}, NOW)))[0], QuotaExceeded)
        assert list(store.verify()) == []

    def test_a_staged_session_that_cannot_be_published_is_as_it_was(self, store: Store) -> None:
        staged = stage(store)
        append(store, staged.sid, 3)
        write(store, SetQuota(Quota("small", max_tokens=2)))
        (beyond,) = write(store, Publish(staged.sid, SessionRow("a", {}, NOW, namespace="small")))
        assert isinstance(beyond, QuotaExceeded)
        created = create(store, "a")
        (taken,) = write(store, Publish(staged.sid, SessionRow("a", {}, NOW)))
        assert isinstance(taken, SessionExists) and store.get_session(named("a")) == created
        assert store.totals().num_tokens == 0 and ids(store.list_sessions(STAGED)) == ["stage"]
        write(store, DeleteSession(staged.sid))
        while store.purge(staged.sid):
            pass
        assert read(store, staged.sid) == b"" and store.list_sessions(STAGED) == []
        (gone,) = write(store, Publish(staged.sid, SessionRow("b", {}, NOW)))
        assert isinstance(gone, NoSuchSession)
        assert list(store.verify()) == []


def stage(store: Store, **values: Any) -> SessionRow:
    return create(store, "stage", namespace=STAGED, **values)
