"""SQLite: the contract, and what is promised about its files, its limits and its errors."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from storage.base import (
    Append,
    Appended,
    Compact,
    CreateSession,
    DeleteSession,
    SessionRow,
    Store,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreUnavailable,
    Summary,
)
from storage.databases.sqlite import PAGE_BYTES, VACUUM_PAGES
from storage.resolve import open_readonly, open_store
from storage.sql.store import KEPT_FREE_BYTES
from storage.sql.tokens.rows import BLOCK_BYTES
from tests.names import named
from tests.storage.branch_contract import BranchContract
from tests.storage.contract import NOW, StoreContract, append, create, ids, read, token, write


class TestSqliteStore(StoreContract, BranchContract):
    @pytest.fixture
    def store(self, sqlite_store: Store) -> Iterator[Store]:
        yield sqlite_store


@contextlib.contextmanager
def on_connect(statement: str) -> Iterator[None]:
    """Run a statement on every connection that is made from here on."""

    def run(connection: sqlite3.Connection, _record: Any) -> None:
        connection.execute(statement).fetchall()

    event.listen(Engine, "connect", run)
    try:
        yield
    finally:
        event.remove(Engine, "connect", run)


def pragma(connection: sqlite3.Connection, name: str) -> Any:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_the_pragmas_are_what_the_documentation_says(path: Path) -> None:
    connections: list[sqlite3.Connection] = []

    def keep(connection: sqlite3.Connection, _record: Any) -> None:
        connections.append(connection)

    store = open_store(f"sqlite:///{path}")
    event.listen(Engine, "connect", keep)
    try:
        create(store)
        store.get_session(named("a"))
        names = (
            *("synchronous", "secure_delete", "journal_mode", "page_size", "auto_vacuum", "query_only"),
            *("busy_timeout", "journal_size_limit"),
        )
        writer, reader = ({name: pragma(connection, name) for name in names} for connection in connections)
    finally:
        event.remove(Engine, "connect", keep)
        store.close()
    in_the_file = {"page_size": 16_384, "auto_vacuum": 2, "journal_mode": "wal"}
    full = {"synchronous": 2, "secure_delete": 1, "query_only": 0, "journal_size_limit": 64 << 20}
    assert writer == {**writer, **in_the_file, **full, "busy_timeout": 5_000}
    assert reader == {**reader, **in_the_file, "query_only": 1, "busy_timeout": 5_000}


# --- files ---


def test_the_data_directory_is_private_and_closing_leaves_one_database_file(path: Path) -> None:
    store = open_store(f"sqlite:///{path}")
    append(store, create(store).sid, 1)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert store.get_session(named("a")) is not None
    store.close()
    assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


def test_odd_characters_in_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a?b#c%20 ü" / "d&e=f.sqlite3"
    store = open_store(f"sqlite:///{path}")
    create(store)
    store.close()
    assert path.is_file()
    readonly = open_readonly(path)
    assert ids(readonly.list_sessions()) == ["a"]
    readonly.close()


def test_a_deleted_session_gives_its_space_back(path: Path) -> None:
    """The driver takes only the first step of `PRAGMA incremental_vacuum`, one page, unless told otherwise."""
    secret = b"do not keep me " * 1_000
    store = open_store(f"sqlite:///{path}")
    sid = create(store).sid
    for _ in range(20):
        write(store, Append(sid, 59, secret * 59))
    before = store.totals().num_disk_bytes
    delete(store, sid)
    store.close()
    assert before > 17_000_000
    assert path.stat().st_size < 550_000
    assert secret[:1_000] not in path.read_bytes()


def fill(store: Store, num_appends: int) -> int:
    """A session of so many appends of 4 MiB."""
    sid = create(store).sid
    for _ in range(num_appends):
        write(store, Append(sid, 64, bytes(64 << 10) * 64))
    return sid


def delete(store: Store, sid: int) -> None:
    write(store, DeleteSession(sid))
    while store.purge():
        pass


def test_a_running_server_uses_free_space_again_or_gives_it_back(path: Path) -> None:
    """By steps, each of which moves little; the file itself gets smaller, without closing it."""
    store = open_store(f"sqlite:///{path}")
    delete(store, fill(store, 10))
    full = path.stat().st_size
    assert full > 40 << 20
    sid = fill(store, 9)
    assert path.stat().st_size <= full, "what was free is used first"
    delete(store, sid)
    num_steps = 1
    while store.give_back():
        num_steps += 1
    assert num_steps == (full - KEPT_FREE_BYTES) // (VACUUM_PAGES * PAGE_BYTES) + 1
    assert KEPT_FREE_BYTES < path.stat().st_size < KEPT_FREE_BYTES + (1 << 20)
    assert not store.give_back()
    store.close()
    assert path.stat().st_size < 1 << 20


def test_what_a_killed_server_did_not_purge_the_next_one_does(path: Path) -> None:
    store = open_store(f"sqlite:///{path}")
    write(store, DeleteSession(fill(store, 3)))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM blocks").fetchone()[0] > 0
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        while store.purge():
            pass
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for table in ("blocks", "leftovers"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0


def test_a_closed_store_refuses(path: Path) -> None:
    """Its lock is gone, so it must not touch the files again."""
    store = open_store(f"sqlite:///{path}")
    sid = create(store).sid
    store.close()
    with pytest.raises(StoreError, match="closed"):
        append(store, sid, 1)
    with pytest.raises(StoreError, match="closed"):
        store.get_session(named("a"))


# --- one server per directory ---


def test_a_second_server_is_refused(path: Path, tmp_path: Path) -> None:
    """In a process of its own; by another name of the same directory; until the first has closed."""
    (tmp_path / "link").symlink_to(path.parent)
    for name in (path, tmp_path / "link" / path.name):
        code = f"from storage.resolve import open_store; open_store('sqlite:///{name}')"
        store = open_store(f"sqlite:///{path}")
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert second.returncode != 0
        assert f"{path.parent} is in use by another server, process {os.getpid()}" in second.stderr
        store.close()
    with contextlib.closing(open_store(f"sqlite:///{path}")), pytest.raises(StoreUnavailable, match="in use"):
        open_store(f"sqlite:///{path}")


def test_reading_only_works_beside_a_server_and_without(path: Path) -> None:
    store = open_store(f"sqlite:///{path}")
    sid = create(store).sid
    append(store, sid, 3, 1, payloads=[b"{}", None, None])
    for _ in range(2):
        readonly = open_readonly(path.parent)
        assert list(readonly.verify()) == []
        assert read(readonly, sid) == token(1) * 3
        with pytest.raises(StoreError, match="reading only"):
            append(readonly, sid, 1)
        readonly.close()
        append(store, sid, 1)
        store.close()
        with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
            assert store.totals().num_tokens in (3, 4)
            write(store, DeleteSession(sid))
            (created,) = write(store, CreateSession(SessionRow("a", {}, NOW)))
            assert isinstance(created, SessionRow)
            sid = created.sid
            append(store, sid, 3, 1)
        store = open_store(f"sqlite:///{path}")
    store.close()


# --- what cannot be opened ---


@pytest.mark.parametrize("url", ["", "sqlite://", "sqlite:///", "memory", "postgres://h/db", "redis://x", "/a/b"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(StoreUnavailable, match="it must be sqlite:///PATH, postgresql"):
        open_store(url)


def refused_unchanged(path: Path, message: str) -> None:
    """Neither opening changes the file."""
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as refused:
            open_store(f"sqlite:///{path}")
        assert str(path) in str(refused.value) and message in str(refused.value)
        with pytest.raises(StoreUnavailable, match=str(path)):
            open_readonly(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database " * 5_000)
    refused_unchanged(path, "cannot be opened: file is not a database")


def test_a_database_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (body)")
    refused_unchanged(path, "of something else")


def test_a_newer_database_is_refused(path: Path) -> None:
    open_store(f"sqlite:///{path}").close()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    refused_unchanged(path, "has schema version 9999, this release knows up to 0013: it is newer")


def test_an_unusable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for inside in ("", "/deeper/still"):
        with pytest.raises(StoreUnavailable) as refused:
            open_store(f"sqlite:///{tmp_path}/file{inside}/htm.sqlite3")
        told = f"{tmp_path}/file{inside} cannot be used as data directory: {tmp_path}/file is not a directory"
        assert str(refused.value) == told
    (tmp_path / "directory").mkdir()
    with pytest.raises(StoreUnavailable, match="directory cannot be opened"):
        open_store(f"sqlite:///{tmp_path}/directory")
    with pytest.raises(StoreUnavailable, match="there is no database at"):
        open_readonly(tmp_path / "missing")


OPEN = """if True:
    import os, sys
    from storage.base import StoreUnavailable
    from storage.resolve import open_store
    open_store("sqlite:///" + sys.argv[2]).close()  # imports all that it needs
    if os.geteuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    try:
        open_store("sqlite:///" + sys.argv[1])
    except StoreUnavailable as error:
        print(error)
"""


def test_a_directory_without_permission_is_refused(path: Path, tmp_path: Path) -> None:
    """Also to a user who may not look into it. It was told with a bare errno."""
    path.parent.mkdir(mode=0o500)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    tmp_path.chmod(0o711)
    path.parent.chmod(0o555)
    command = [sys.executable, "-c", OPEN, str(path), str(tmp_path / "first" / "htm.sqlite3")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert told.startswith(f"{path.parent} cannot be used as data directory: this user may not write to {path.parent}")


def test_the_users_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of the name `~` was made in the current one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("sqlite:///~/data/htm.sqlite3").close()
    assert (tmp_path / "data" / "htm.sqlite3").is_file()
    open_readonly("sqlite:///~/data").close()


def test_an_empty_file_is_a_new_database(path: Path) -> None:
    """A crash at the first start may leave one."""
    path.parent.mkdir()
    path.touch()
    with pytest.raises(StoreUnavailable, match="empty database"):
        open_readonly(path)
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        assert store.totals().num_sessions == 0


# --- failures ---


def test_a_long_append_is_several_blocks(sqlite_store: Store) -> None:
    """So that a reader never holds much, whatever was appended together."""
    sid = create(sqlite_store).sid
    num_tokens = 3 * BLOCK_BYTES // 1_000 + 1
    data = bytes(index % 251 for index in range(num_tokens)) * 1_000
    assert write(sqlite_store, Append(sid, num_tokens, data)) == [Appended(0, num_tokens)]
    sizes = [len(block.data) for block in sqlite_store.read_blocks(sid)]
    assert len(sizes) == 4 and max(sizes) <= BLOCK_BYTES
    assert read(sqlite_store, sid) == data
    assert list(sqlite_store.verify()) == []


def test_a_full_disk_refuses_the_group_and_goes_on(path: Path) -> None:
    store = open_store(f"sqlite:///{path}")
    sid = create(store).sid
    append(store, sid, 1, 1)
    store.close()
    with on_connect("PRAGMA max_page_count=30"):
        store = open_store(f"sqlite:///{path}")
        small = Append(sid, 1, token(2), payloads=[b"{}"])
        for _ in range(3):
            with pytest.raises(StoreFull, match="full"):
                write(store, small, Append(sid, 101, b"x" * 10_000 * 101, idempotency_key="k", digest=b"d"))
            assert read(store, sid) == token(1)
        assert write(store, small) == [Appended(1, 2)]
        assert read(store, sid) == token(1) + token(2)
    with pytest.raises(StoreFull):  # the connection keeps its limit until it fails
        append(store, sid, 1_000_003)
    assert append(store, sid, 1_000_003, idempotency_key="k", digest=b"d") == Appended(2, 1_000_005)
    assert list(store.verify()) == []
    store.close()


def test_a_database_locked_by_another_process_is_an_error(path: Path) -> None:
    with on_connect("PRAGMA busy_timeout=50"):
        store = open_store(f"sqlite:///{path}")
        sid = create(store).sid
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="locked"):
                append(store, sid, 1)
            assert store.get_session(named("a")) is not None
        assert append(store, sid, 1) == Appended(0, 1)
        store.close()


def test_values_the_database_cannot_express_are_an_error(sqlite_store: Store) -> None:
    sid = create(sqlite_store).sid
    with pytest.raises(StoreError, match="cannot be stored"):
        append(sqlite_store, sid, 1, episode=2**63)
    with pytest.raises(StoreError, match="cannot be stored"):
        sqlite_store.get_session(named("\ud800"))
    assert append(sqlite_store, sid, 1, episode=2**63 - 1) == Appended(0, 1)


def test_a_damaged_block_is_named_and_the_rest_is_read(path: Path, sqlite_store: Store) -> None:
    sid, other = create(sqlite_store, "it's damaged").sid, create(sqlite_store, "b").sid
    for value in range(3):
        append(sqlite_store, sid, 2, value)
        append(sqlite_store, other, 2, value)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE blocks SET data = zeroblob(14) WHERE log = ? AND start = 2", [sid])
    found = sqlite_store.read_blocks(sid)
    assert next(found).start == 0
    with pytest.raises(StoreDamaged, match='session "it\'s damaged" is damaged at position 2'):
        next(found)
    assert [block.start for block in sqlite_store.read_blocks(sid, 4)] == [4]
    assert len(read(sqlite_store, other)) == 6 * 7
    assert append(sqlite_store, sid, 1) == Appended(6, 7)


def test_a_session_of_damaged_settings_is_in_no_list_and_can_be_deleted(path: Path, sqlite_store: Store) -> None:
    sid = create(sqlite_store).sid
    create(sqlite_store, "b")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE sessions SET settings = '{' WHERE id = 'a'")
    row = sqlite_store.get_session(named("a"))
    assert row is not None and (row.sid, row.settings) == (sid, {})
    assert ids(sqlite_store.list_sessions()) == ["b"]
    assert sqlite_store.get_session(named("b")) is not None
    (deleted,) = write(sqlite_store, DeleteSession(sid))
    assert deleted == row and sqlite_store.get_session(named("a")) is None


def test_sealing_joins_what_came_in_small_pieces(path: Path) -> None:
    """Up to a limit, within an episode, and only blocks that lie wholly in the compacted chunks."""
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        (row,) = store.write([CreateSession(SessionRow("a", {}, 0.0))], now=0.0)
        assert isinstance(row, SessionRow)
        token = bytes(range(256)) * 64  # 16 KiB, so that four fill a block
        appends = [Append(row.sid, 1, token, episode=number // 7) for number in range(11)]
        store.write([*appends, Append(row.sid, 2, token * 2)], now=1.0)
        before = b"".join(block.data for block in store.read_blocks(row.sid))
        store.write([Compact(row.sid, Summary(0, 4, b"s"), 3)], now=2.0)
        blocks = list(store.read_blocks(row.sid))
        assert [(block.start, block.num_tokens, block.episode) for block in blocks] == [
            *((0, 4, 0), (4, 3, 0), (7, 4, 1)),
            (11, 2, None),  # reaches beyond the last compacted chunk
        ]
        assert b"".join(block.data for block in blocks) == before
        assert list(store.verify()) == []


def test_sealing_leaves_large_blocks_where_they_are(path: Path) -> None:
    """A few tokens behind a large append had all of it written anew."""
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        (row,) = store.write([CreateSession(SessionRow("a", {}, 0.0))], now=0.0)
        assert isinstance(row, SessionRow)
        token = bytes(range(256)) * 64  # 16 KiB, so that four fill a block
        store.write([Append(row.sid, 4, token * 4) for _ in range(2)], now=1.0)
        store.write([Append(row.sid, 1, token) for _ in range(3)], now=2.0)
        store.write([Append(row.sid, 4, token * 4), Append(row.sid, 1, token)], now=3.0)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE touched (what TEXT, start INTEGER)")
            for what, of in (("INSERT", "NEW"), ("DELETE", "OLD")):
                connection.execute(
                    f"CREATE TRIGGER on_{what} AFTER {what} ON blocks "
                    f"BEGIN INSERT INTO touched VALUES ('{what}', {of}.start); END"
                )
        before = b"".join(block.data for block in store.read_blocks(row.sid))
        store.write([Compact(row.sid, Summary(0, 4, b"s"), 4)], now=4.0)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            written = sorted(connection.execute("SELECT what, start FROM touched"))
        assert written == [("DELETE", 8), ("DELETE", 9), ("DELETE", 10), ("DELETE", 15), ("INSERT", 8), ("INSERT", 15)]
        blocks = list(store.read_blocks(row.sid))
        assert [(block.start, block.num_tokens) for block in blocks] == [(0, 4), (4, 4), (8, 3), (11, 4), (15, 1)]
        assert b"".join(block.data for block in blocks) == before
        assert list(store.verify()) == []


def test_damage_is_not_hidden_by_sealing(path: Path) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        (row,) = store.write([CreateSession(SessionRow("a", {}, 0.0))], now=0.0)
        assert isinstance(row, SessionRow)
        store.write([Append(row.sid, 1, bytes([number] * 8)) for number in range(9)], now=1.0)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE blocks SET data = zeroblob(8) WHERE start = 4")
        store.write([Compact(row.sid, Summary(0, 3, b"s"), 3)], now=2.0)
        with pytest.raises(StoreDamaged, match="'a' is damaged at position 4"):
            list(store.read_blocks(row.sid))
        assert [(block.start, block.num_tokens) for block in store.read_blocks(row.sid, 5)] == [(5, 4)]
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE summaries SET data = zeroblob(1)")
        assert list(store.read_summaries(row.sid)) == []  # computed again


@pytest.mark.parametrize("how", [open_store, open_readonly])
def test_parameters_of_a_url_are_refused(how: Callable[[str], Store], tmp_path: Path) -> None:
    """They became part of the file's name, a password too."""
    with pytest.raises(StoreUnavailable, match="takes no parameters, and this one has 'password'") as refused:
        how(f"sqlite:///{tmp_path}/htm?password=secret")
    assert "secret" not in str(refused.value) and list(tmp_path.iterdir()) == []
