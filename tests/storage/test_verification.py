"""`verify` finds each kind of damage, and says where."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from storage.base import Compact, Damage, KeepSketches, Summary
from storage.resolve import open_readonly, open_store
from tests.names import named
from tests.storage.contract import append, create, write


@pytest.mark.parametrize(
    ("damage", "session_id", "messages"),
    [
        ("DELETE FROM blocks WHERE start = 2", "a", ["begins at position 5, 2 was", "hold 21 bytes, 42 are"]),
        ("DELETE FROM blocks WHERE start = 5", "a", ["end at position 5, its length is 6", "hold 35 bytes, 42 are"]),
        ("UPDATE blocks SET num_tokens = 4 WHERE start = 2", "a", ["begins at position 5, 6 was"]),
        ("UPDATE blocks SET data = zeroblob(21) WHERE start = 2", "a", ["position 2 does not match its checksum"]),
        ("UPDATE blocks SET checksum = 0 WHERE start = 5", "a", ["position 5 does not match its checksum"]),
        ("UPDATE sessions SET length = 7", "a", ["end at position 6, its length is 7"]),
        ("UPDATE sessions SET num_bytes = 43", "a", ["hold 42 bytes, 43 are recorded"]),
        ("UPDATE sessions SET settings = '{'", "a", ["settings cannot be read: they are no JSON object"]),
        ("UPDATE payloads SET position = 6", "a", ["1 payloads lie outside its tokens, 0 to 6"]),
        ("UPDATE payloads SET log = 99", None, ["1 rows of table payloads belong to no session"]),
        ("UPDATE summaries SET data = x'00'", "a", ["the summaries of the chunks 0 to 1 do not match"]),
        ("UPDATE sketches SET checksum = 0", "a", ["the sketches of the chunks 1 to 2 do not match their checksum"]),
        ("UPDATE sketches SET log = 99", None, ["1 rows of table sketches belong to no session"]),
        ("INSERT INTO idempotency VALUES (99, 'k', x'00', 0, 1, 0)", None, ["1 rows of table idempotency belong"]),
        ("UPDATE blocks SET log = 99 WHERE start = 5", None, ["1 rows of table blocks belong to no session"]),
    ],
)
def test_each_kind_of_damage_is_found(path: Path, damage: str, session_id: str | None, messages: list[str]) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sid = create(store).sid
        append(store, sid, 2, 1, payloads=[b"{}", None])
        append(store, sid, 3, 2)
        append(store, sid, 1, 3)
        write(store, Compact(sid, Summary(0, 2, b"keys"), 2), KeepSketches(sid, Summary(1, 2, b"sketches"), 2, 1))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(damage).rowcount == 1
    with contextlib.closing(open_readonly(path)) as store:
        problems = list(store.verify())
    here = [
        problem.message
        for problem in problems
        if problem.session == (None if session_id is None else named(session_id))
    ]
    assert len(here) == len(messages), problems
    for message, expected in zip(here, messages, strict=True):
        assert expected in message


def test_a_damaged_file_is_reported_not_raised(path: Path) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sid = create(store).sid
        for value in range(101):
            append(store, sid, 103, value)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 16_384 * 16_384
    content[middle : middle + 16_384] = b"\x55" * 16_384
    path.write_bytes(content)
    with contextlib.closing(open_readonly(path)) as store:
        problems = list(store.verify())
    assert any(problem.session is None and "file is damaged" in problem.message for problem in problems)


def test_an_untouched_database_has_no_problems(path: Path) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        assert list(store.verify()) == list[Damage]()
        append(store, create(store).sid, 3)
        assert list(store.verify()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM blocks WHERE start = 10", "begins at position 12, 10 was expected"),
        ("UPDATE sessions SET first_position = 15", "begins at position 10, 15 was expected"),
        ("DELETE FROM blocks", "end at position 10, its length is 18"),
        ("UPDATE payloads SET position = 9 WHERE position = 10", "payloads lie outside its tokens, 10 to 18"),
    ],
)
def test_damage_of_a_session_that_was_trimmed(path: Path, damage: str, message: str) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sid = create(store, max_tokens=11).sid
        for value in range(6):
            append(store, sid, 3, value, payloads=[b"{}"] * 3, trim_chunk=5)
        assert list(store.verify()) == []
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(damage)
    with contextlib.closing(open_readonly(path)) as store:
        assert any(message in problem.message for problem in store.verify())
