"""Repair keeps what can be read and says what it does not; a backup is whole however busy the server is."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from storage.base import (
    Append,
    Appended,
    Compact,
    KeepSketches,
    PutModel,
    StoreDamaged,
    StoreError,
    StoreUnavailable,
    Summary,
)
from storage.databases import backup
from storage.resolve import DATABASE_NAME, back_up, open_for_repair, open_readonly, open_store
from storage.sql.repair import Repair
from tests.names import named
from tests.storage.contract import append, create, model, read, token, write


def damaged(path: Path, *statements: str) -> None:
    """Sessions `a` and `b` of six blocks of two tokens each, and of `a` what the statements make of it."""
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        for name in "ab":
            sid = create(store, name).sid
            for value in range(6):
                key = {"idempotency_key": str(value), "digest": b"d"}
                append(store, sid, 2, value, payloads=[b"{}"] * 2, **key)
            write(store, Compact(sid, Summary(0, 2, b"keys"), 3))
            write(store, KeepSketches(sid, Summary(0, 4, b"sketches"), 3, 1))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        # compaction joined the blocks of the first two chunks: 0 to 5, 6 to 7, 8 to 9, 10 to 11
        for statement in statements:
            assert connection.execute(statement).rowcount > 0


@pytest.mark.parametrize(
    ("statement", "message", "length"),
    [
        ("UPDATE blocks SET data = zeroblob(14) WHERE log = 1 AND start = 8",
         "the tokens 8 to 11, 4 of 12, because the block at position 8 does not match its checksum", 8),
        ("UPDATE blocks SET data = zeroblob(42) WHERE log = 1 AND start = 0",
         "the tokens 0 to 11, 12 of 12, because the block at position 0 does not match its checksum", 0),
        ("DELETE FROM blocks WHERE log = 1 AND start = 6",
         "the tokens 6 to 11, 6 of 12, because those from 6 to 7 are missing", 6),
        ("DELETE FROM blocks WHERE log = 1 AND start = 10",
         "the tokens 10 to 11, 2 of 12, because those from 10 on are missing", 10),
        ("UPDATE sessions SET num_bytes = 5 WHERE sid = 1", "nothing; its record of length or bytes is put right", 12),
        ("UPDATE sessions SET length = 11 WHERE sid = 1", "nothing; its record of length or bytes is put right", 12),
        ("UPDATE sketches SET data = x'' WHERE log = 1",
         "nothing; its summaries and sketches are made again, because the sketches of the chunks 0 to 3 do not match "
         "their checksum", 12),
        ("UPDATE summaries SET checksum = 7 WHERE log = 1",
         "nothing; its summaries and sketches are made again, because the summaries of the chunks 0 to 1 do not match "
         "their checksum", 12),
    ],
)  # fmt: skip
def test_the_readable_beginning_is_kept(path: Path, statement: str, message: str, length: int) -> None:
    damaged(path, statement)
    with contextlib.closing(open_for_repair(path.parent)) as store:
        before = path.read_bytes()
        (repair,) = store.plan_repair()
        assert isinstance(repair, Repair)
        assert (repair.session, repair.message, repair.length) == (named("a"), message, length)
        assert path.read_bytes() == before, "it is said before anything is written"
        store.carry_out_repair([repair])
        assert list(store.verify()) == [] and store.plan_repair() == []
        expected = b"".join(token(value) * 2 for value in range(6))
        assert read(store, 1) == expected[: length * 7] and read(store, 2) == expected
        assert store.read_payload_range(1, 0, 99).keys() == set(range(length))
        assert list(store.read_summaries(1)) == list(store.read_sketches(1, 1)) == []
        assert list(store.read_summaries(2)) == [Summary(0, 2, b"keys")]
        assert list(store.read_sketches(2, 1)) == [Summary(0, 4, b"sketches")]
        repeated = append(store, 1, 2, 5, idempotency_key="5", digest=b"d")
        assert repeated == (Appended(10, 12, replayed=True) if length == 12 else Appended(length, length + 2))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE model_parts SET data = zeroblob(10) WHERE version = 1 AND number = 1",
         "part 1 of its bytes does not match its checksum"),
        ("DELETE FROM model_parts WHERE version = 1 AND number = 1", "part 1 of its bytes is missing"),
        ("DELETE FROM model_parts WHERE version = 1 AND number = 2", "it has 20 bytes, 30 are recorded"),
        ("DELETE FROM model_parts WHERE version = 1", "its bytes are not there"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_read_goes_and_others_stay(path: Path, statement: str, message: str) -> None:
    damaged(path)
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        rows = [model(store, name, b"0123456789" * 3, version, num_parts=3) for version, name in enumerate("ab", 1)]
        write(store, *(PutModel(row, {}) for row in rows))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(statement).rowcount > 0
    with contextlib.closing(open_for_repair(path)) as store:
        (found,) = store.verify()
        assert found.message == f"model 'a' of namespace 'default' is damaged: {message}"
        (repair,) = store.plan_repair()
        assert str(repair) == f"model 'a' of namespace 'default' is lost: {message}"
        store.carry_out_repair([repair])
        assert list(store.verify()) == [] and store.list_models() == rows[1:]
        assert store.read_model(rows[1]) == b"0123456789" * 3


@pytest.mark.parametrize("settings", ["[]", "{"])
def test_what_has_no_readable_settings_and_what_belongs_to_nobody_goes(path: Path, settings: str) -> None:
    damaged(
        path,
        f"UPDATE sessions SET settings = '{settings}' WHERE sid = 1",
        "INSERT INTO payloads VALUES (99, 0, x'00')",
        "UPDATE payloads SET position = 12 WHERE log = 2 AND position = 11",
    )
    with contextlib.closing(open_for_repair(path)) as store:
        (repair,) = store.plan_repair()
        assert repair.message == ("all of it, 12 tokens, because its settings cannot be read: they are no JSON object")
        store.carry_out_repair([repair])
        assert [row.id for row in store.list_sessions()] == ["b"]
        assert list(store.verify()) == []


def test_what_the_domain_cannot_read_goes_as_well(path: Path) -> None:
    damaged(path, "UPDATE sessions SET settings = '{}' WHERE sid = 1")

    def check(settings: Mapping[str, Any]) -> str | None:
        return None if settings else "they lack all"

    with contextlib.closing(open_for_repair(path)) as store:
        assert store.plan_repair() == [] and list(store.verify()) == []
        assert [problem.message for problem in store.verify(check)] == ["its settings cannot be read: they lack all"]
        repairs = store.plan_repair(check)
        assert [repair.message for repair in repairs] == [
            "all of it, 12 tokens, because its settings cannot be read: they lack all"
        ]
        store.carry_out_repair(repairs)
        assert list(store.verify(check)) == []


def test_a_session_that_was_trimmed_is_repaired_from_its_first_position_on(path: Path) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        sid = create(store, max_tokens=11).sid
        for value in range(6):
            append(store, sid, 3, value, payloads=[b"{}"] * 3, trim_chunk=5)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE blocks SET checksum = 0 WHERE start = 15")
    with contextlib.closing(open_for_repair(path)) as store:
        repairs = store.plan_repair()
        assert [repair.message.split(",")[:2] for repair in repairs] == [["the tokens 15 to 17", " 3 of 8"]]
        store.carry_out_repair(repairs)
        assert list(store.verify()) == []
        row = store.get_session(named("a"))
        assert row is not None and (row.first_position, row.length) == (10, 15)


def test_what_repair_cannot_do(path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no database at"):
        open_for_repair(path)
    damaged(path)
    with contextlib.closing(open_store(f"sqlite:///{path}")), pytest.raises(StoreUnavailable, match="in use"):
        open_for_repair(path.parent)
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        for value in range(101):
            append(store, 1, 103, value)
    with contextlib.closing(sqlite3.connect(path)) as connection:  # a page that nobody needs to open the database
        (page,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'blocks'").fetchone()
    content = bytearray(path.read_bytes())
    content[(page - 1) * 16_384 : page * 16_384] = b"\x55" * 16_384
    path.write_bytes(content)
    with (
        contextlib.closing(open_for_repair(path)) as store,
        pytest.raises(StoreDamaged, match=r"(?s)the database itself is damaged: .*; a backup may help"),
    ):
        store.plan_repair()


def test_a_backup_beside_a_writer_is_a_beginning_of_what_it_wrote(path: Path, tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{path}")
    sid = create(store).sid
    append(store, sid, 40, 0, idempotency_key="first", digest=b"d")
    done, length = threading.Event(), [40]

    def go_on() -> None:
        while not done.is_set():
            outcome = write(store, Append(sid, 40, b"".join(token(length[0] + n) for n in range(40))))
            assert outcome == [Appended(length[0], length[0] + 40)]
            length[0] += 40

    writer = threading.Thread(target=go_on)
    writer.start()
    seen = []
    try:
        for number in range(5):
            before = length[0]
            back_up(path.parent, tmp_path / f"copy{number}")
            seen.append((before, length[0]))
    finally:
        done.set()
        writer.join()
    store.close()
    assert seen[-1][1] > 40, "the writer wrote meanwhile"
    for number, (before, after) in enumerate(seen):
        with contextlib.closing(open_store(f"sqlite:///{tmp_path}/copy{number}/{DATABASE_NAME}")) as copy:
            row = copy.get_session(named("a"))
            assert row is not None and before <= row.length <= after + 40
            expected = token(0) * 40 + b"".join(token(value) for value in range(40, row.length))
            assert read(copy, sid) == expected
            assert list(copy.verify()) == []
            assert append(copy, sid, 1) == Appended(row.length, row.length + 1)
    assert (tmp_path / "copy0").stat().st_mode & 0o777 == 0o700


def test_a_backup_overwrites_nothing_and_leaves_nothing_unfinished(path: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no database at"):
        back_up(path.parent, tmp_path / "copy")
    damaged(path)
    target = tmp_path / "copy" / DATABASE_NAME
    target.parent.mkdir()
    target.with_name(f"{DATABASE_NAME}.unfinished").write_bytes(b"of a copy that was killed")
    back_up(path, tmp_path / "copy")
    assert {file.name for file in target.parent.iterdir()} == {DATABASE_NAME}
    with pytest.raises(StoreUnavailable, match="exists already; a backup does not overwrite"):
        back_up(path, tmp_path / "copy")
    (tmp_path / "junk").write_bytes(b"no database " * 5_000)
    with pytest.raises(StoreError, match=r"junk cannot be copied to .*: file is not a database"):
        backup.back_up(tmp_path / "junk", tmp_path / "other" / DATABASE_NAME)
    assert list((tmp_path / "other").iterdir()) == []
    with contextlib.closing(open_readonly(tmp_path / "copy")) as copy:
        assert copy.totals().num_sessions == 2


def test_postgresql_is_repaired_by_its_url(postgresql_url: str) -> None:
    with contextlib.closing(open_store(postgresql_url)) as store:
        sid = create(store).sid
        for value in range(6):
            append(store, sid, 2, value, payloads=[b"{}"] * 2)
    engine = create_engine(postgresql_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE blocks SET checksum = 0 WHERE start = 8"))
    engine.dispose()
    with contextlib.closing(open_for_repair(postgresql_url)) as opened:
        (repair,) = opened.plan_repair()
        assert repair.message.startswith("the tokens 8 to 11, 4 of 12, because the block at position 8")
        opened.carry_out_repair([repair])
        assert list(opened.verify()) == []
        assert read(opened, sid) == b"".join(token(value) * 2 for value in range(4))
