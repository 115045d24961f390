"""The statements of a group: few, looked up by index, and what is known from one group to the next."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Delete, Engine, Insert, Select, Update, event

from storage.base import Append, Appended, NoSuchSession, Store, StoreError
from storage.databases.sqlite import open_sqlite
from storage.sql import write_group as group
from tests.storage.contract import create, token, write


def test_statements_of_appends_are_made_once(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """To put four together for each group took as long as to write an append and to sync it."""
    sids = [create(sqlite_store, f"s{number}").sid for number in range(4)]

    def appends(key: str) -> list[Append]:
        plain = [Append(sid, 1, token(1), [b"{}"]) for sid in sids]
        return [*plain, *(Append(sid, 1, token(1), idempotency_key=key, digest=b"d") for sid in sids)]

    write(sqlite_store, *appends("first"))
    made: list[object] = []
    for kind in (Select, Insert, Update, Delete):
        monkeypatch.setattr(kind, "__init__", lambda self, *_, **__: made.append(self))
    assert all(isinstance(one, Appended) for one in write(sqlite_store, *appends("second"))) and not made


def test_no_statement_of_a_group_reads_a_whole_table(path: Path, sqlite_store: Store) -> None:
    """Keys were once looked up without their sessions: each group read all keys of the last 24 hours."""
    sids = [create(sqlite_store, f"s{n}").sid for n in range(5)]
    sqlite_store.close()
    with contextlib.closing(open_sqlite(path)) as store, noted() as statements:
        assert store.erase()  # of what servers before it may have deleted; a stop would do it
        statements.clear()
        for number in range(2):
            write(
                store, *(Append(sid, 1, token(1), [b"{}"], idempotency_key=f"k{number}", digest=b"d") for sid in sids)
            )
        statements = list(statements)  # before it is closed, which may rewrite the file
    owner, keys, rows = ["BEGIN", "SELECT"], ["SELECT", "SELECT"], ["INSERT", "INSERT", "INSERT", "UPDATE", "COMMIT"]
    # Lengths are looked up once, and that there is no quota.
    assert verbs(statements) == [*owner, "SELECT", *keys, "SELECT", *rows, *owner, *keys, *rows]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            if statement.split()[0] not in ("BEGIN", "COMMIT"):
                plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
                assert not any(step.startswith("SCAN") for step in plan), (statement, plan)


@pytest.mark.parametrize("change", ["UPDATE sessions SET length = 7", "DELETE FROM sessions"])
def test_what_somebody_else_changed_is_never_written_over(path: Path, sqlite_store: Store, change: str) -> None:
    """What is known of sessions from one group to the next is compared with what is there, then learned again."""
    sid = create(sqlite_store, "s").sid
    write(sqlite_store, Append(sid, 1, token(1)))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(change)
    with pytest.raises(StoreError, match="something else than its owner"):
        write(sqlite_store, Append(sid, 1, token(2)))
    (outcome,) = write(sqlite_store, Append(sid, 1, token(2)))
    assert isinstance(outcome, Appended | NoSuchSession)
    assert not isinstance(outcome, Appended) or outcome.start == 7


def test_what_a_group_that_failed_found_out_is_forgotten(path: Path, sqlite_store: Store) -> None:
    """Its transaction is rolled back, and so must be the lengths that it counted."""
    sid = create(sqlite_store, "s").sid
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TRIGGER t BEFORE INSERT ON payloads BEGIN SELECT RAISE(ABORT, 'no'); END")
    with pytest.raises(StoreError, match="no"):
        write(sqlite_store, Append(sid, 1, token(1)), Append(sid, 1, token(2), [b"{}"]))
    assert write(sqlite_store, Append(sid, 1, token(1))) == [Appended(0, 1)]
    assert list(sqlite_store.verify()) == []


def test_few_sessions_are_known_at_once(sqlite_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which they are does not show in the answers."""
    monkeypatch.setattr(group, "MAX_TALLIES", 2)
    sids = [create(sqlite_store, f"s{n}").sid for n in range(5)]
    for length in (1, 2, 3):
        outcomes = write(sqlite_store, *(Append(sid, 1, token(length)) for sid in sids))
        assert outcomes == [Appended(length - 1, length)] * 5
    assert list(sqlite_store.verify()) == []


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """The statements, with their values, that SQLite executes on connections that are made meanwhile; no pragmas."""
    statements: list[str] = []

    def note(statement: str) -> None:
        if not statement.startswith("PRAGMA"):
            statements.append(statement)

    def watch(connection: sqlite3.Connection, _record: Any) -> None:
        connection.set_trace_callback(note)

    event.listen(Engine, "connect", watch)
    try:
        yield statements
    finally:
        event.remove(Engine, "connect", watch)


def verbs(statements: list[str]) -> list[str]:
    """The first word of each, of those alike but for their values only once."""
    alike = groupby(statements, lambda statement: statement.split()[:3])
    return [words[0] for words, _ in alike]
