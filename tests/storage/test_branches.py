"""Sessions that share tokens in a database: what a fork costs, damage that several read, erasing, crashes."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from storage.base import Compact, DeleteSession, Fork, SessionRow, Store, StoreDamaged, Summary, Truncate
from storage.resolve import back_up, open_for_repair, open_readonly, open_store
from tests.names import named
from tests.storage.branch_contract import NOW, SIZE, expect, fork, grow, new, purge, token, truncate, write
from tests.storage.test_erasure import CHUNK, fill, found, sessions


def num_rows(path: Path, table: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_a_fork_is_a_few_rows(path: Path, sqlite_store: Store) -> None:
    parent = new(sqlite_store, "parent", 300)
    before = {table: num_rows(path, table) for table in ("blocks", "payloads", "summaries", "sessions", "spans")}
    sid = fork(sqlite_store, parent, "child", 299)
    fork(sqlite_store, sid, "grandchild", 17)
    added = {table: num_rows(path, table) - num for table, num in before.items()}
    assert added == {"blocks": 0, "payloads": 0, "summaries": 0, "sessions": 2, "spans": 2}


def test_a_session_that_shares_nothing_any_more_has_one_log_again(path: Path, sqlite_store: Store) -> None:
    parent = new(sqlite_store, "parent", 30)
    child = fork(sqlite_store, parent, "child", 20)
    grow(sqlite_store, child, 20, 33, shift=9)
    truncate(sqlite_store, child, 0)
    truncate(sqlite_store, parent, 25)
    assert num_rows(path, "spans") == num_rows(path, "leftovers") == 0
    expect(sqlite_store, "parent", 0, (25, 0))


def test_damage_is_that_of_each_session_that_reads_it(path: Path, sqlite_store: Store) -> None:
    parent = new(sqlite_store, "parent", 30)
    reads = fork(sqlite_store, parent, "reads", 20)
    grow(sqlite_store, reads, 20, 24, shift=9)
    before, beside = fork(sqlite_store, reads, "before", 9), new(sqlite_store, "beside", 9)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE blocks SET data = zeroblob(21) WHERE log = ? AND start = 12", [parent])
    for sid, name in ((parent, "parent"), (reads, "reads")):
        with pytest.raises(StoreDamaged, match=f"session '{name}' is damaged at position 12"):
            list(sqlite_store.read_blocks(sid))
        assert sum(block.num_tokens for block in sqlite_store.read_blocks(sid, 15)) == (15 if sid == parent else 9)
    for sid in (before, beside):
        assert sum(block.num_tokens for block in sqlite_store.read_blocks(sid)) == 9
    problems = list(sqlite_store.verify())
    assert [(str(one.session), one.message) for one in problems] == [
        (name, "the block at position 12 does not match its checksum") for name in ("parent", "reads")
    ]


def test_repair_keeps_of_each_session_what_is_before_the_damage(path: Path) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        parent = new(store, "parent", 30)
        reads = fork(store, parent, "reads", 20)
        grow(store, reads, 20, 24, shift=9)
        fork(store, reads, "late", 22)
        write(store, Compact(parent, Summary(0, 6, b"012345"), SIZE))
        fork(store, reads, "before", 9)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM blocks WHERE log = ? AND start = 20", [reads])
        connection.execute("UPDATE blocks SET checksum = 1 WHERE log = ?", [parent])
        connection.execute("INSERT INTO spans VALUES (99, 0, 7, 1, 5)")
        connection.execute("INSERT INTO payloads VALUES (98, 0, x'00')")
    with contextlib.closing(open_readonly(path)) as store:
        messages = {one.message for one in store.verify()}
        assert {f"1 rows of table {table} belong to no session" for table in ("spans", "payloads")} <= messages
    with contextlib.closing(open_for_repair(f"sqlite:///{path}")) as store:
        store.carry_out_repair(store.plan_repair())
        assert list(store.verify()) == []
        for name in ("parent", "reads", "late", "before"):
            expect(store, name, 0)


def test_what_was_truncated_is_in_no_file(path: Path, sqlite_store: Store) -> None:
    """Whether others share the log or not, and what they share stays, until they go too."""
    rows = sessions(sqlite_store)
    lengths = fill(sqlite_store, rows, 1_500)
    shared = lengths["session2"] // 2
    (child,) = write(sqlite_store, Fork(rows["session2"].sid, SessionRow("child", {"labels": {}}, NOW), CHUNK, shared))
    assert isinstance(child, SessionRow)
    for name, length in (("session1", 19), ("session2", 11), ("session3", 0)):
        (row,) = write(sqlite_store, Truncate(rows[name].sid, length, CHUNK))
        assert row == sqlite_store.get_session(named(name))
    purge(sqlite_store)
    assert sqlite_store.erase()
    assert found(path.parent, "session3") == found(path.parent, "session1", 19) == []
    assert found(path.parent, "session2", shared) == []
    assert {kind for _, kind in found(path.parent, "session2", 11, shared)} == {
        *("text", "embedding", "summary", "sketch")
    }
    write(sqlite_store, DeleteSession(child.sid))
    purge(sqlite_store)
    assert sqlite_store.erase()
    assert found(path.parent, "session2", 11) == [] and found(path.parent, "session2", 0, 11) != []
    assert list(sqlite_store.verify()) == []


def test_a_backup_has_the_branches(path: Path, sqlite_store: Store, tmp_path: Path) -> None:
    parent = new(sqlite_store, "parent", 30)
    child = fork(sqlite_store, parent, "child", 21)
    grow(sqlite_store, child, 21, 26, shift=4)
    truncate(sqlite_store, parent, 17)
    back_up(path.parent, tmp_path / "copy")
    with contextlib.closing(open_store(f"sqlite:///{tmp_path}/copy/{path.name}")) as copy:
        expect(copy, "parent", 0, (17, 0))
        expect(copy, "child", 0, (21, 0), (26, 4))


WRITER = """if True:
    import os, random, signal, sys, threading, time
    from storage.base import DeleteSession, SessionKey
    from storage.resolve import open_store
    from tests.storage.branch_contract import fork, grow, new, purge, truncate, write
    store = open_store(sys.argv[1])
    draw = random.Random(int(sys.argv[2]))
    threading.Thread(target=lambda: (time.sleep(draw.uniform(0.05, 0.8)), os.kill(os.getpid(), signal.SIGKILL))).start()
    base = new(store, "base", 90)
    print("ready", flush=True)
    for number in range(10**6):
        name = f"n{number}"
        sid = fork(store, base, name, draw.randrange(40, 90))
        length = store.get_session(SessionKey("default", name)).length
        grow(store, sid, length, length + 20, shift=100)
        truncate(store, sid, draw.randrange(0, length + 20))
        if draw.random() < 0.5:
            write(store, DeleteSession(sid))
        print(name, flush=True)
"""


@pytest.mark.parametrize("seed", range(4))
def test_killed_while_forking_and_truncating(path: Path, seed: int) -> None:
    """Whole writes are there, or none of them; what was left is purged by the next owner."""
    command = [sys.executable, "-c", WRITER, f"sqlite:///{path}", str(seed)]
    writer = subprocess.run(command, timeout=60, check=False, stdout=subprocess.PIPE)
    assert writer.returncode == -signal.SIGKILL
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        assert list(store.verify()) == []
        for row in store.list_sessions(limit=10_000):
            read = b"".join(block.data for block in store.read_blocks(row.sid))
            texts = store.read_payload_range(row.sid, 0, 10**6)
            assert read == b"".join(token(int(texts[number])) for number in range(row.length))
        purge(store)
        assert list(store.verify()) == []
