"""The journal: what is in it is there for every reader, is folded into few rows, and survives what it must."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.base import (
    IDEMPOTENCY_SECONDS,
    Append,
    Appended,
    DeleteSession,
    KeyReused,
    Seal,
    Store,
    StoreDamaged,
    StoreError,
    StoreFenced,
    Summary,
    UpdateSession,
    Write,
)
from storage.databases.sqlite import open_sqlite
from storage.resolve import open_for_repair, open_readonly, open_store
from storage.sql import journal
from storage.sql.journal import MAX_ENTRY_BYTES
from storage.sql.store import SqlStore
from storage.sql.write_group import WriteGroup
from tests.storage.contract import NOW, append, create, ids, read, token, write
from tests.storage.test_group import noted, verbs


def counts(path: Path) -> dict[str, int]:
    """Rows of each table."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = ("journal", "blocks", "payloads", "idempotency")
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}


@contextlib.contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody else's connection; what it did is committed."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        yield connection


@pytest.fixture
def left(path: Path, tmp_path: Path) -> Path:
    """A database as a killed server leaves it: two sessions, three groups in the journal, nothing folded."""
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sids = [create(store, id_).sid for id_ in "ab"]
        for value in range(3):
            key: dict[str, Any] = {"idempotency_key": f"k{value}", "digest": b"d"}
            write(store, *(Append(sid, 2, token(value) * 2, [b"{}", None], value, **key) for sid in sids))
        copy = tmp_path / "left" / path.name
        copy.parent.mkdir()
        for suffix in ("", "-wal"):
            copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    assert counts(copy) == {"journal": 3, "blocks": 0, "payloads": 0, "idempotency": 0}
    return copy


def test_a_group_of_small_appends_is_one_statement_and_one_row(path: Path, sqlite_store: Store) -> None:
    sids = [create(sqlite_store, f"s{n}").sid for n in range(5)]
    sqlite_store.close()
    with contextlib.closing(open_sqlite(path)) as store:
        with noted() as statements:
            for number in range(2):
                write(store, *(Append(sid, 1, token(number), [b"{}"]) for sid in sids))
        owner, row = ["BEGIN", "SELECT"], ["INSERT", "COMMIT"]
        assert verbs(statements) == [*owner, "SELECT", *row, *owner, *row]  # lengths are looked up once
        assert counts(path) == {"journal": 2, "blocks": 0, "payloads": 0, "idempotency": 0}
        assert all(read(store, sid) == token(0) + token(1) for sid in sids)
        assert list(store.verify()) == []


def test_a_full_journal_is_folded_into_few_rows(
    path: Path, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MAX_BYTES", 12 * (journal.ENTRY_BYTES + 7))
    sids = [create(sqlite_store, f"s{n}").sid for n in range(3)]
    for value in range(4):
        write(sqlite_store, *(Append(sid, 1, token(value), [b"{}"]) for sid in sids))
    assert counts(path) == {"journal": 4, "blocks": 0, "payloads": 0, "idempotency": 0}
    write(sqlite_store, *(Append(sid, 1, token(4)) for sid in sids))
    assert counts(path) == {"journal": 1, "blocks": 3, "payloads": 12, "idempotency": 0}
    assert all(read(sqlite_store, sid) == b"".join(map(token, range(5))) for sid in sids)
    assert list(sqlite_store.verify()) == []


def test_payloads_count_as_well(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """They did not: 4,096 appends of a small token with a payload of 16 KiB were 64 MB in memory, and a million
    payloads of small tokens were folded at once, while everybody waited for 7 s (16 s on PostgreSQL)."""
    monkeypatch.setattr(journal, "MAX_BYTES", 3 * (journal.ENTRY_BYTES + 2 * 7 + 2 * journal.PAYLOAD_BYTES + 100))
    assert isinstance(sqlite_store, SqlStore)
    sid = create(sqlite_store).sid
    for _ in range(3):
        assert not sqlite_store._journal.is_full
        append(sqlite_store, sid, 2, payloads=[b"x" * 98, b"{}"])
    assert sqlite_store._journal.is_full


def test_totals_are_few_statements_however_many_sessions_are_in_the_journal(path: Path, sqlite_store: Store) -> None:
    """They were one for each."""
    sids = [create(sqlite_store, f"s{n}").sid for n in range(20)]
    sqlite_store.close()
    with noted() as statements, contextlib.closing(open_sqlite(path)) as store:
        write(store, *(Append(sid, 1, token(1)) for sid in sids))
        statements.clear()
        assert store.totals().num_tokens == 20
        assert [statement.split()[0] for statement in statements] == ["BEGIN", "SELECT", "SELECT", "ROLLBACK"]


@pytest.mark.parametrize("what", ["large", "payload", "seal", "update", "delete", "evict"])
def test_what_is_not_for_the_journal_folds_it_first(path: Path, sqlite_store: Store, what: str) -> None:
    """And goes into the tables at once."""
    sid, full = create(sqlite_store).sid, create(sqlite_store, "full", max_tokens=5).sid
    append(sqlite_store, full, 5)
    append(sqlite_store, sid, 2, 1)
    assert counts(path)["journal"] == 2
    others: dict[str, Write] = {
        "large": Append(sid, 1, bytes(MAX_ENTRY_BYTES + 1)),
        "payload": Append(sid, 1, token(2), [b"x" * MAX_ENTRY_BYTES]),
        "seal": Seal(sid, Summary(0, 1, b"s"), 2),
        "update": UpdateSession(sid, {"n": 1}),
        "delete": DeleteSession(sid),
        "evict": Append(full, 2, token(3) * 2, evict_chunk=2),
    }
    first, _ = write(sqlite_store, Append(sid, 1, token(7)), others[what])
    assert first == Appended(2, 3)
    assert counts(path)["journal"] == 0
    assert list(sqlite_store.verify()) == []
    if what != "delete":
        assert read(sqlite_store, sid).startswith(token(1) * 2 + token(7))


def test_deleted_tokens_leave_the_file(path: Path) -> None:
    """Those in the journal too."""
    secret = b"a secret of sixty-four bytes, so that it is found in the file..."
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sid = create(store).sid
        write(store, Append(sid, 1, secret, [b'{"text": "another secret, in a payload"}']))
        write(store, DeleteSession(sid))
    content = path.read_bytes()
    assert secret not in content and b"another secret" not in content


def test_keys_in_the_journal_are_remembered_and_forgotten(path: Path, sqlite_store: Store) -> None:
    sid = create(sqlite_store).sid
    key: dict[str, Any] = {"idempotency_key": "k", "digest": b"d"}
    assert append(sqlite_store, sid, 2, **key) == Appended(0, 2)
    assert append(sqlite_store, sid, 2, **key) == Appended(0, 2, replayed=True)
    assert isinstance(append(sqlite_store, sid, 2, idempotency_key="k", digest=b"e"), KeyReused)
    assert counts(path) == {"journal": 1, "blocks": 0, "payloads": 0, "idempotency": 0}
    assert append(sqlite_store, sid, 1, **key, now=NOW + IDEMPOTENCY_SECONDS) == Appended(2, 3)
    assert counts(path) == {"journal": 1, "blocks": 1, "payloads": 0, "idempotency": 0}
    sqlite_store.close()
    assert counts(path) == {"journal": 0, "blocks": 2, "payloads": 0, "idempotency": 1}


def test_what_no_table_takes_never_gets_into_the_journal(sqlite_store: Store) -> None:
    """It could not be folded, and nothing could be written any more."""
    sid = create(sqlite_store).sid
    for values in ({"episode": 2**63}, {"idempotency_key": "\ud800", "digest": b"d"}):
        with pytest.raises(StoreError, match="cannot be stored"):
            append(sqlite_store, sid, 1, **values)
    assert append(sqlite_store, sid, 1, episode=-(2**63)) == Appended(0, 1)
    write(sqlite_store, UpdateSession(sid, {}))
    assert append(sqlite_store, sid, 1) == Appended(1, 2)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE sessions SET length = 2 WHERE sid = 1",
        "DELETE FROM blocks; UPDATE sessions SET length = 2 WHERE sid = 1",
    ],
)
def test_what_could_not_be_folded_never_gets_into_the_journal(path: Path, sqlite_store: Store, damage: str) -> None:
    """A damaged row, here of a session that has blocks or payloads beyond its length, was nobody else's trouble while
    appends went into the tables. In the journal, its append made every fold fail, and with it every group: nothing
    could be written for any session, and the store could not be opened any more."""
    sid, other = create(sqlite_store).sid, create(sqlite_store, "b").sid
    write(sqlite_store, *(Append(sid, 1, token(value), [b"{}"]) for value in range(4)))
    write(sqlite_store, UpdateSession(other, {}))
    with database(path) as connection:
        connection.execute("UPDATE blocks SET start = start + 2")  # so that the next one is in its place
        connection.executescript(damage)
    sqlite_store.close()
    for _ in range(2):
        with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
            with pytest.raises(StoreError, match="UNIQUE"):
                append(store, sid, 1, payloads=[b"{}"])
            assert isinstance(append(store, other, 1), Appended)
            write(store, UpdateSession(other, {}))


def test_a_key_that_an_index_refuses_never_gets_into_the_journal(postgresql_url: str) -> None:
    """It could not be folded: nothing could be written any more, and the store could not be opened."""
    key = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    with contextlib.closing(open_store(postgresql_url)) as store:
        sid = create(store).sid
        with pytest.raises(StoreError, match="index row"):
            append(store, sid, 1, idempotency_key=key, digest=b"d")
        assert append(store, sid, 1) == Appended(0, 1)


def test_closing_waits_for_a_group_that_is_being_written(
    path: Path, sqlite_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group counted in memory only after it had let the next writer in. If that was the fold of a stop, it deleted
    the group's row without having folded it: an append that was reported done was lost."""
    sid = create(sqlite_store).sid
    append(sqlite_store, sid, 1, 1)
    closing = threading.Thread(target=sqlite_store.close)
    publish = WriteGroup.publish

    def publish_late(group: WriteGroup) -> None:
        closing.start()
        closing.join(0.3)
        publish(group)

    monkeypatch.setattr(WriteGroup, "publish", publish_late)
    assert append(sqlite_store, sid, 1, 2) == Appended(1, 2)
    closing.join()
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        assert read(store, sid) == token(1) + token(2) and list(store.verify()) == []


def test_a_group_that_fails_leaves_the_journal_as_it_was(path: Path, sqlite_store: Store) -> None:
    sid = create(sqlite_store).sid
    append(sqlite_store, sid, 1, 1)
    with database(path) as connection:
        connection.execute("CREATE TRIGGER t BEFORE INSERT ON blocks BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(StoreError, match="no"):
        write(sqlite_store, Append(sid, 1, token(2)), UpdateSession(sid, {}))
    assert append(sqlite_store, sid, 1, 3) == Appended(1, 2)
    with database(path) as connection:
        connection.execute("DROP TRIGGER t")
    write(sqlite_store, UpdateSession(sid, {}))
    assert read(sqlite_store, sid) == token(1) + token(3)
    assert counts(path)["journal"] == 0 and list(sqlite_store.verify()) == []


def test_readers_see_every_token_once_while_it_is_folded(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read all the time; each must see what it saw before, and all that was reported done."""
    monkeypatch.setattr(journal, "MAX_BYTES", 7 * journal.ENTRY_BYTES)
    sid = create(sqlite_store).sid
    done, failures = [0], list[str]()

    def look() -> None:
        seen = 0
        while done[0] < 600 and not failures:
            before = done[0]
            found = read(sqlite_store, sid)
            row = sqlite_store.get_session("a")
            payloads = sqlite_store.read_payload_range(sid, 0, before)
            expected = b"".join(map(token, range(len(found) // 7)))
            if found != expected or len(found) // 7 < max(before, seen):
                failures.append(f"{before} were done, {seen} seen before: {found!r}")
            if row is None or row.length < before or len(payloads) != before:
                failures.append(f"{before} were done: {row}, {len(payloads)} payloads")
            seen = len(found) // 7

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for value in range(600):
        append(sqlite_store, sid, 1, value, payloads=[b"{}"])
        done[0] = value + 1
    for reader in readers:
        reader.join()
    assert failures == []


def test_a_reader_beside_the_writer_sees_the_journal(path: Path, sqlite_store: Store) -> None:
    sid = create(sqlite_store).sid
    append(sqlite_store, sid, 2, 1, payloads=[b"1", b"2"], episode=4)
    write(sqlite_store, UpdateSession(sid, {"labels": {}}))
    append(sqlite_store, sid, 2, 2, payloads=[None, b"3"], episode=4)
    append(sqlite_store, sid, 1, 3, episode=5)
    with contextlib.closing(open_readonly(path)) as readonly:
        for store in (sqlite_store, readonly):
            assert read(store, sid) == token(1) * 2 + token(2) * 2 + token(3)
            assert [block.start for block in store.read_blocks(sid, 3, 4)] == [2]
            assert store.read_payload_range(sid, 1, 4) == {1: b"2", 3: b"3"}
            assert store.read_payloads(sid, [0, 3, 4]) == {0: b"1", 3: b"3"}
            assert store.read_episodes(sid, 9) == [(0, 4), (4, 5)]
            assert store.read_episodes(sid, 4) == [(0, 4)]
            assert [row.length for row in store.list_sessions()] == [5]
            assert list(store.verify()) == []
        assert readonly.totals() == sqlite_store.totals()
        assert readonly.get_session("a") == sqlite_store.get_session("a")


def test_what_a_killed_server_left_is_folded_by_the_next(left: Path) -> None:
    with contextlib.closing(open_readonly(left)) as readonly:
        assert list(readonly.verify()) == [] and readonly.totals().num_tokens == 12
    with contextlib.closing(open_store(f"sqlite:///{left}")) as store:
        assert counts(left) == {"journal": 0, "blocks": 6, "payloads": 6, "idempotency": 6}
        assert read(store, 1) == read(store, 2) == b"".join(token(value) * 2 for value in range(3))
        assert append(store, 1, 2, 2, idempotency_key="k2", digest=b"d") == Appended(4, 6, replayed=True)
        assert append(store, 1, 1) == Appended(6, 7)
        assert list(store.verify()) == []


def test_a_damaged_entry_is_that_of_its_session_alone(left: Path) -> None:
    with database(left) as connection:
        (data,) = connection.execute("SELECT data FROM journal WHERE seq = 2").fetchone()
        at = data.index(token(1))
        changed = data[:at] + b"\xff" + data[at + 1 :]
        connection.execute("UPDATE journal SET data = ? WHERE seq = 2", [changed])
    message = "the append in the journal at position 2 does not match its checksum"
    with contextlib.closing(open_readonly(left)) as readonly:
        assert [(problem.session_id, problem.message) for problem in readonly.verify()] == [("a", message)]
        with pytest.raises(StoreDamaged, match="'a' is damaged at position 2"):
            read(readonly, 1)
    with contextlib.closing(open_store(f"sqlite:///{left}")) as store:
        assert len(read(store, 2)) == 6 * 7
        with pytest.raises(StoreDamaged, match="'a' is damaged at position 2"):
            read(store, 1)
        assert [problem.session_id for problem in store.verify()] == ["a"]


def test_one_damaged_index_loses_nothing(left: Path) -> None:
    with database(left) as connection:
        connection.execute("UPDATE journal SET entries = x'5b5d' WHERE seq = 2")
        connection.execute("UPDATE journal SET entries_again = x'5b5d' WHERE seq = 3")
    with contextlib.closing(open_store(f"sqlite:///{left}")) as store:
        assert list(store.verify()) == [] and store.totals().num_tokens == 12


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("entries = x'5b5d', entries_again = x''", "its index does not match its checksum"),
        ("data = x'00'", "its data has 1 bytes, 32 were expected"),
    ],
)
def test_a_row_that_cannot_be_read_is_reported_kept_and_repaired(
    left: Path, damage: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The server starts all the same, and what follows shows what is missing."""
    with database(left) as connection:
        connection.execute(f"UPDATE journal SET {damage} WHERE seq = 2")
    message = f"row 2 of the journal cannot be read, {why}: its appends are lost"
    with contextlib.closing(open_store(f"sqlite:///{left}")) as store:
        assert message in caplog.text
        assert counts(left)["journal"] == 1
        other = create(store, "c").sid
        assert append(store, other, 1, 5) == Appended(0, 1)
        write(store, UpdateSession(other, {}))
        assert read(store, other) == token(5)
        problems = [(problem.session_id, problem.message) for problem in store.verify()]
        gap = "a block begins at position 4, 2 was expected"
        assert (None, message) in problems and ("a", gap) in problems and ("b", gap) in problems
    with contextlib.closing(open_for_repair(left)) as opened:
        repairs = opened.plan_repair()
        assert [(repair.session_id, repair.length) for repair in repairs] == [(None, None), ("a", 2), ("b", 2)]
        opened.carry_out_repair(repairs)
        assert list(opened.verify()) == [] and opened.plan_repair() == []
        assert read(opened, 1) == token(0) * 2 and ids(opened.list_sessions()) == ["a", "b", "c"]
    assert counts(left)["journal"] == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_what_follows_a_lost_row_stays_where_it_was(path: Path, tmp_path: Path, lost: int) -> None:
    """Tokens of one episode were joined although a row between them was lost: those after it moved to its positions,
    and were read as if they had been appended there."""
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sid = create(store).sid
        for value in range(4):
            append(store, sid, 1, value)
        with database(path) as connection:
            connection.execute("UPDATE journal SET entries = x'', entries_again = x'' WHERE seq = ?", [lost + 1])
        (tmp_path / "left").mkdir()
        left = tmp_path / "left" / path.name
        for suffix in ("", "-wal"):
            left.with_name(left.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    with contextlib.closing(open_store(f"sqlite:///{left}")) as store:
        rest = b"".join(map(token, range(lost + 1, 4)))
        assert [(block.start, block.data) for block in store.read_blocks(sid, lost + 1)] == [(lost + 1, rest)]
        with pytest.raises(StoreDamaged, match=f"at position {lost}: the next tokens are those from {lost + 1} on"):
            read(store, sid)


@pytest.mark.parametrize(
    "change", ["UPDATE sessions SET length = 1 WHERE sid = 1", "DELETE FROM sessions WHERE sid = 1"]
)
def test_entries_that_do_not_fit_any_more_end_the_store(path: Path, sqlite_store: Store, change: str) -> None:
    """Somebody changed a session's row: what follows it cannot be known; the next start takes what fits."""
    reasons: list[str] = []
    sqlite_store.watch(reasons.append)
    sid, other = create(sqlite_store).sid, create(sqlite_store, "b").sid
    append(sqlite_store, sid, 3)
    with database(path) as connection:
        connection.execute(change)
    with pytest.raises(StoreFenced, match="changed by something else than its owner"):
        write(sqlite_store, UpdateSession(other, {}))
    assert len(reasons) == 1
    sqlite_store.close()
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        assert append(store, other, 1) == Appended(0, 1)
        assert counts(path)["blocks"] == 0


def test_entries_of_no_session_are_reported(left: Path) -> None:
    with database(left) as connection:
        connection.execute("DELETE FROM sessions WHERE sid = 2")
    with contextlib.closing(open_readonly(left)) as readonly:
        (problem,) = readonly.verify()
    assert problem.message == "entries of the journal belong to no session: to 1 that are not there"


def test_entries_that_leave_a_gap_are_reported(left: Path) -> None:
    with database(left) as connection:
        connection.execute("DELETE FROM journal WHERE seq = 2")
    with contextlib.closing(open_readonly(left)) as readonly:
        messages = [problem.message for problem in readonly.verify()]
    assert messages == ["an append in the journal begins at position 4, 2 was expected"] * 2
