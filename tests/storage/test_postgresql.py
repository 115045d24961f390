"""PostgreSQL: the contract, and what is promised about its settings, its errors and lost connections."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from psycopg.errors import AdminShutdown, DataCorrupted, IndexCorrupted, IoError, OperationalError
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from storage.base import (
    Append,
    Appended,
    Block,
    PutModel,
    Store,
    StoreDamaged,
    StoreError,
    StoreFenced,
    StoreFull,
    StoreUnavailable,
    UpdateSession,
)
from storage.databases import postgresql
from storage.resolve import open_for_repair, open_readonly, open_store
from storage.sql.failures import is_damage
from storage.sql.repair import Repair
from storage.sql.tables import metadata
from tests.names import named
from tests.storage.branch_contract import BranchContract
from tests.storage.contract import StoreContract, append, create, ids, model, read, token, write
from tests.storage.test_state_machine import SETTINGS, StoreMachine

BLOBS = ("blocks.data", "model_parts.data", "payloads.body", "sketches.data", "summaries.data")


@pytest.fixture
def postgresql_store(postgresql_url: str) -> Iterator[Store]:
    store = open_store(postgresql_url)
    yield store
    store.close()


class TestPostgresqlStore(StoreContract, BranchContract):
    @pytest.fixture
    def store(self, postgresql_store: Store) -> Iterator[Store]:
        yield postgresql_store


def test_any_order_of_writes_and_restarts(new_postgresql_url: Callable[[], str]) -> None:
    """Each example has a schema of its own."""

    class Machine(StoreMachine):
        def __init__(self) -> None:
            self.url = new_postgresql_url()
            super().__init__()

        def open(self) -> Store:
            return open_store(self.url)

        def crash(self) -> None:
            """The next owner takes over while this one is there; what it holds in memory it cannot write."""
            end_lease(self.url)
            left, self.store = self.store, self.open()
            left.close()

    run_state_machine_as_test(Machine, settings=settings(SETTINGS, max_examples=8))


def psql(url: str) -> contextlib.closing[psycopg.Connection[Any]]:
    """A connection of someone else."""
    return contextlib.closing(psycopg.connect(url.replace("+psycopg", ""), autocommit=True))


def end_lease(url: str) -> None:
    """As if its owner had given it back, without its knowing; that of a frozen process would be waited for."""
    with psql(url) as connection:
        connection.execute("UPDATE owners SET expires_at = NULL")


@contextlib.contextmanager
def listening(name: str, listener: Callable[..., Any]) -> Iterator[None]:
    event.listen(Engine, name, listener)
    try:
        yield
    finally:
        event.remove(Engine, name, listener)


# --- what is set ---


def test_columns_are_as_the_documentation_says(postgresql_url: str, postgresql_store: Store) -> None:
    query = """
        SELECT attrelid::regclass || '.' || attname, attstorage::text, attcollation::regcollation::text
        FROM pg_attribute JOIN pg_class ON attrelid = pg_class.oid
        WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'
    """
    with psql(postgresql_url) as connection:
        columns = {name: (storage, collation) for name, storage, collation in connection.execute(query).fetchall()}
    assert {columns[name][0] for name in BLOBS} == {"e"}
    assert columns["sessions.id"][1] == '"C"'


def test_the_migrations_make_the_tables(postgresql_url: str, postgresql_store: Store) -> None:
    engine = create_engine(postgresql_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


@pytest.mark.parametrize(("chosen", "used"), [("off", "on"), ("on", "on"), ("remote_apply", "remote_apply")])
def test_connections_are_set_as_the_documentation_says(postgresql_url: str, chosen: str, used: str) -> None:
    connections: list[psycopg.Connection[Any]] = []
    store = open_store(f"{postgresql_url}%20-csynchronous_commit%3D{chosen}")
    with listening("connect", lambda connection, record: connections.append(connection)):
        sid = create(store).sid
        append(store, sid, 1)
        assert read(store, sid) == token(1) * 0 + token(0)
        (writer, reader) = connections
        names = ("synchronous_commit", "lock_timeout", "idle_in_transaction_session_timeout", "transaction_isolation")
        values = [writer.execute(f"SHOW {name}").fetchone() for name in names]
        assert values == [(used,), ("5s",), ("5s",), ("read committed",)]
        writer.rollback()
        assert reader.execute("SHOW transaction_isolation").fetchone() == ("repeatable read",)
        assert reader.execute("SHOW transaction_read_only").fetchone() == ("on",)
        reader.rollback()
        assert {connection.cursor().format for connection in connections} == {psycopg.pq.Format.BINARY}
    store.close()


def test_the_password_is_not_told(postgresql_url: str) -> None:
    url = postgresql_url.replace("bench@", "bench:secret@")
    store = open_store(url)
    store.close()
    with pytest.raises(StoreError, match="is closed") as closed:
        store.totals()
    with pytest.raises(StoreUnavailable) as refused:
        open_store(url.replace("/postgres?", "/nowhere?"))
    assert "secret" not in f"{store.url} {closed.value} {refused.value}"
    assert "bench:***@127.0.0.1" in store.url and "nowhere" in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://127.0.0.1:1/x?password=secret",
        "postgresql://127.0.0.1:1/x?user=me&sslpassword=secret&passfile=/secret&sslkey=/secret",
        "postgresql://me:secret@127.0.0.1:1/x?sslmode=secret",
        "postgresql://me:se@cret@127.0.0.1:1/x",
        "postgresql:me:secret@127.0.0.1/x",
        "postgres://me:secret@127.0.0.1/x",
    ],
)
def test_no_password_is_told_of_what_cannot_be_opened(url: str) -> None:
    """One among the URL's parameters was printed, and one in a URL of another form."""
    for open_it in (open_store, open_readonly, open_for_repair):
        with pytest.raises(StoreUnavailable) as refused:
            open_it(url)
        told = str(refused.value).replace("sslmode=secret", "").replace('sslmode value: "secret"', "")
        assert "secret" not in told and "cret@" not in told


# --- what cannot be opened ---


def test_a_missing_driver_is_named(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreUnavailable, match=r"needs psycopg .*pip install '\.\[postgresql\]'"):
        open_store(postgresql_url)


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(StoreUnavailable, match="cannot be parsed; it must be postgresql"):
        open_store("postgresql://host:port/database")


def test_what_cannot_be_reached_is_refused() -> None:
    with pytest.raises(StoreUnavailable, match=r"postgresql\+psycopg://127.0.0.1:1/x.* cannot be opened: connection"):
        open_store("postgresql://127.0.0.1:1/x")


def test_another_encoding_is_refused(postgresql_url: str) -> None:
    with psql(postgresql_url) as connection:
        connection.execute("CREATE DATABASE plain ENCODING 'SQL_ASCII' TEMPLATE template0")
    with pytest.raises(StoreUnavailable, match="has the encoding SQL_ASCII, it must be UTF8"):
        open_store(postgresql_url.replace("/postgres?", "/plain?"))


def test_a_database_of_something_else_is_refused(postgresql_url: str) -> None:
    with psql(postgresql_url) as connection:
        connection.execute("CREATE TABLE owners (body text)")
        with pytest.raises(StoreUnavailable, match="of something else"):
            open_store(postgresql_url)
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = current_schema()").fetchone() == (
            1,
        )


def test_a_newer_database_is_refused(postgresql_url: str) -> None:
    open_store(postgresql_url).close()
    with psql(postgresql_url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreUnavailable, match="it is newer"):
        open_store(postgresql_url)
    with pytest.raises(StoreUnavailable, match="it is newer"):
        open_readonly(postgresql_url)


def test_reading_only_works_beside_a_server(postgresql_url: str) -> None:
    with pytest.raises(StoreUnavailable, match="empty database"):
        open_readonly(postgresql_url)
    with contextlib.closing(open_store(postgresql_url)) as store:
        sid = create(store).sid
        append(store, sid, 3)
        with contextlib.closing(open_readonly(postgresql_url)) as readonly:
            assert list(readonly.verify()) == []
            assert read(readonly, sid) == token(0) * 3
            assert readonly.totals() == store.totals()
            with pytest.raises(StoreError, match="reading only"):
                append(readonly, sid, 1)


# --- one owner ---


def test_a_second_server_is_refused_while_the_first_lives(postgresql_url: str) -> None:
    with contextlib.closing(open_store(postgresql_url, lease_s=0.6)) as first:
        sid = create(first).sid
        for _ in range(2):
            with pytest.raises(
                StoreUnavailable, match=f"in use by another server: process {os.getpid()} on .*, whose lease"
            ):
                open_store(postgresql_url, lease_s=0.6)
        assert append(first, sid, 1) == Appended(0, 1)
    with contextlib.closing(open_store(postgresql_url, lease_s=1_000.0)) as second:  # at once: the first released it
        assert append(second, sid, 1) == Appended(1, 2)


def test_a_killed_server_is_waited_for_no_longer_than_its_lease(postgresql_url: str) -> None:
    code = "import sys; from storage.resolve import open_store"
    code += "; store = open_store(sys.argv[1], lease_s=0.8); print(store.url, flush=True); input()"
    command = [sys.executable, "-c", code, postgresql_url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("postgresql")
        process.kill()
    with contextlib.closing(open_store(postgresql_url)) as store:
        assert append(store, create(store).sid, 1) == Appended(0, 1)


def test_a_stale_store_writes_nothing(postgresql_url: str) -> None:
    reasons: list[str] = []
    first = open_store(postgresql_url, lease_s=1_000.0)
    first.watch(reasons.append)
    sid = create(first).sid
    end_lease(postgresql_url)
    with contextlib.closing(open_store(postgresql_url)) as second:
        with pytest.raises(StoreFenced, match="another server owns this data since"):
            append(first, sid, 1, 1)
        assert append(second, sid, 1, 2) == Appended(0, 1)
        assert read(first, sid) == token(2), "what is there"
        first.close()
        assert append(second, sid, 1, 3) == Appended(1, 2)
    assert len(reasons) == 1


# --- failures ---


def test_a_full_disk_refuses_the_group_and_goes_on(postgresql_url: str, postgresql_store: Store) -> None:
    sid = create(postgresql_store).sid
    with psql(postgresql_url) as connection:
        connection.execute("""
            CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$
        """)
        connection.execute("CREATE TRIGGER full_disk BEFORE INSERT ON payloads EXECUTE FUNCTION full_disk()")
        with pytest.raises(StoreFull, match="No space left"):
            append(postgresql_store, sid, 1, payloads=[b"{}"])
        assert append(postgresql_store, sid, 1, 1) == Appended(0, 1)
        connection.execute("DROP TRIGGER full_disk ON payloads")
    assert append(postgresql_store, sid, 1, 2, payloads=[b"{}"]) == Appended(1, 2)
    assert read(postgresql_store, sid) == token(1) + token(2)


def end_connections(url: str) -> None:
    """Have the server end all connections but this one."""
    with psql(url) as connection:
        others = "application_name = 'htm-service' AND pid <> pg_backend_pid()"
        connection.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {others}")


def test_a_connection_that_is_lost_while_verifying_is_no_damage(postgresql_url: str, postgresql_store: Store) -> None:
    """It was reported as a problem of the data, and left a cursor open, of which psycopg warned at any later time."""
    create(postgresql_store)
    with pytest.raises(StoreError, match="terminating connection"):
        list(postgresql_store.verify(lambda settings: end_connections(postgresql_url)))
    gc.collect()  # a warning is an error
    assert list(postgresql_store.verify()) == []


class Relay:
    """A TCP port that leads to another one of this machine, until it is cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sides: list[tuple[socket.socket, threading.Thread]] = []
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut(is_reset=False)

    def cut(self, *, is_reset: bool) -> None:
        """End all connections; when this returns both sides can know."""
        for side, carrying in self._sides:
            side.shutdown(socket.SHUT_RD)
            carrying.join()
            if is_reset:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for side, _ in self._sides:
            side.close()
        self._sides.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
                for pair in ((near, far), (far, near)):
                    carrying = threading.Thread(target=self._carry, args=pair, daemon=True)
                    carrying.start()
                    self._sides.append((pair[0], carrying))

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)


@pytest.mark.parametrize(
    ("error", "is_damaged"),
    [(DataCorrupted, True), (IndexCorrupted, True), (IoError, True), (AdminShutdown, False), (OperationalError, False)],
)
def test_what_postgresql_calls_damage(error: type[psycopg.Error], is_damaged: bool) -> None:
    assert is_damage(DBAPIError("SELECT", None, error("why"))) == is_damaged


def test_a_connection_that_is_lost_while_idle_is_not_noticed(postgresql_url: str, postgresql_store: Store) -> None:
    """The first write and the first read after it failed, though nothing of them had been sent."""
    sid = create(postgresql_store).sid
    readings = [postgresql_store.read_blocks(sid) for _ in range(3)]
    append(postgresql_store, sid, 1, 0)
    assert [next(reading).start for reading in readings] == [0] * 3  # so that there are several connections
    for reading in readings:
        assert list(reading) == []
    for number in range(1, 4):
        end_connections(postgresql_url)
        assert append(postgresql_store, sid, 1, number) == Appended(number, number + 1)
        for _ in range(4):
            assert read(postgresql_store, sid) == b"".join(map(token, range(number + 1)))
        assert postgresql_store.get_session(named("a")) is not None


def test_a_read_that_outlives_its_store_leaves_no_connection(postgresql_url: str) -> None:
    """What looks after sessions beside requests reads in a thread, which nobody waits for when a server stops."""
    store = open_store(postgresql_url)
    sid = create(store).sid
    for number in range(3):
        append(store, sid, 1, number)
    reading = store.read_blocks(sid)
    next(reading)
    store.close()
    assert len(list(reading)) == 2
    del reading, store
    gc.collect()  # an open one warns here, which is an error


def test_a_connection_that_is_lost_at_work_is_an_error_once(postgresql_url: str, postgresql_store: Store) -> None:
    """How far it came is not known."""
    sid = create(postgresql_store).sid

    def end(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT sessions.sid"):
            end_connections(postgresql_url)

    with listening("before_cursor_execute", end):
        with pytest.raises(StoreError, match="terminating connection"):
            write(postgresql_store, UpdateSession(sid, {}))
        with pytest.raises(StoreError, match="terminating connection"):
            postgresql_store.get_session(named("a"))
    assert append(postgresql_store, sid, 1, 2) == Appended(0, 1)
    assert read(postgresql_store, sid) == token(2)


def test_a_connection_that_the_network_ends_while_idle_is_not_noticed(
    postgresql_url: str, postgresql_port: int
) -> None:
    """Without a word of PostgreSQL's."""
    with Relay(postgresql_port) as relay:
        url = postgresql_url.replace(f":{postgresql_port}/", f":{relay.port}/")
        with contextlib.closing(open_store(url, lease_s=1_000.0)) as store:
            sid = create(store).sid
            assert store.get_session(named("a")) is not None
            for number, how in enumerate(("reset", "end")):
                relay.cut(is_reset=how == "reset")
                assert append(store, sid, 1, number) == Appended(number, number + 1)
                assert read(store, sid) == b"".join(map(token, range(number + 1)))


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_commit_that_is_not_answered_is_looked_up(postgresql_store: Store, is_committed: bool) -> None:
    """Were it taken for a failure, the group would be tried again, and its tokens be there twice."""
    sid = create(postgresql_store).sid

    def lose(connection: Any) -> None:
        driver = connection.connection.dbapi_connection
        if is_committed:
            driver.commit()
        driver.close()

    with listening("commit", lose):
        if is_committed:
            assert append(postgresql_store, sid, 1, 1) == Appended(0, 1)
        else:
            with pytest.raises(StoreError, match="closed"):
                append(postgresql_store, sid, 1, 1)
    assert append(postgresql_store, sid, 1, 2) == Appended(int(is_committed), 1 + int(is_committed))
    assert read(postgresql_store, sid) == token(1) * is_committed + token(2)


def test_a_commit_on_its_way_is_waited_for(postgresql_url: str, postgresql_store: Store) -> None:
    engine = create_engine(postgresql_url)
    with psql(postgresql_url) as connection:
        connection.execute("BEGIN")
        transaction = connection.execute(f"SELECT {postgresql.TRANSACTION}").fetchall()[0][0]
        timer = threading.Timer(0.3, connection.execute, ["COMMIT"])
        timer.start()
        assert postgresql.has_committed(engine, transaction)
        timer.join()
    engine.dispose()


@pytest.mark.parametrize("how", ["COMMIT", "ROLLBACK"])
def test_the_number_of_a_transaction_proves_no_commit_after_a_crash(postgresql_url: str, how: str) -> None:
    """Bug: a group that a crash undid was acknowledged, because its number was used again and that was committed."""
    engine = create_engine(postgresql_url)
    with psql(postgresql_url) as connection:
        connection.execute("BEGIN")
        transaction = connection.execute(f"SELECT {postgresql.TRANSACTION}").fetchall()[0][0]
        connection.execute(how)
        assert postgresql.has_committed(engine, transaction) == (how == "COMMIT")
        connection.execute("SELECT pg_stat_reset_shared('bgwriter')")  # as a crash does
    if how == "COMMIT":
        with pytest.raises(StoreError, match=r"crashed since, and may have given the number \d+ to another"):
            postgresql.has_committed(engine, transaction)
    else:
        assert not postgresql.has_committed(engine, transaction)
    engine.dispose()


def test_a_commit_of_which_nobody_tells_ends_the_store(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "COMMIT_SECONDS", 0.1)
    reasons: list[str] = []
    postgresql_store.watch(reasons.append)
    sid = create(postgresql_store).sid

    def lose(connection: Any) -> None:
        connection.connection.dbapi_connection.close()

    def refuse(*_: Any) -> None:
        raise psycopg.OperationalError("nobody there")

    unknown = r"whether the last group was written cannot be known: .*nobody there"
    with listening("commit", lose), listening("do_connect", refuse), pytest.raises(StoreFenced, match=unknown):
        append(postgresql_store, sid, 1, 1)
    with pytest.raises(StoreFenced):
        append(postgresql_store, sid, 1, 1)
    assert len(reasons) == 1


def test_a_lock_of_someone_else_is_an_error(
    postgresql_url: str, postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "BUSY_MS", 50)
    with psql(postgresql_url) as connection, connection.transaction():
        connection.execute("LOCK TABLE sessions IN EXCLUSIVE MODE")
        with pytest.raises(StoreError, match="lock timeout"):
            create(postgresql_store)
        assert ids(postgresql_store.list_sessions()) == []
    assert append(postgresql_store, create(postgresql_store).sid, 1) == Appended(0, 1)


def test_a_writer_that_stops_in_the_middle_holds_nobody_up(
    postgresql_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "BUSY_MS", 300)
    wait = threading.Event()

    def freeze(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO sessions"):
            wait.wait(1.0)

    with listening("before_cursor_execute", freeze), pytest.raises(StoreError, match="idle-in-transaction"):
        create(postgresql_store)
    monkeypatch.undo()
    assert append(postgresql_store, create(postgresql_store).sid, 1) == Appended(0, 1)


def test_values_the_database_cannot_express_are_an_error(postgresql_store: Store) -> None:
    sid = create(postgresql_store).sid
    for call in (
        lambda: append(postgresql_store, sid, 1, episode=2**63),
        lambda: postgresql_store.get_session(named("\ud800")),
        lambda: postgresql_store.get_session(named("\0")),
    ):
        with pytest.raises(StoreError):
            call()
    assert append(postgresql_store, sid, 1, episode=2**63 - 1) == Appended(0, 1)


def test_damage_is_found(postgresql_url: str, postgresql_store: Store) -> None:
    sid = create(postgresql_store).sid
    for value in range(3):
        append(postgresql_store, sid, 2, value, payloads=[b"{}", None])
    with psql(postgresql_url) as connection:
        connection.execute(r"UPDATE blocks SET data = '\x00'::bytea WHERE start = 2")
        connection.execute("UPDATE payloads SET position = 9 WHERE position = 4")
        connection.execute("UPDATE sessions SET settings = '[]'")
        connection.execute("INSERT INTO summaries VALUES (99, 0, 1, 0, '')")
    messages = [problem.message for problem in postgresql_store.verify()]
    expected = [
        "settings cannot be read: they are no JSON object",
        "position 2 does not match",
        "hold 29 bytes, 42 are",
        "1 payloads lie outside",
    ]
    expected.append("1 rows of table summaries belong to no session")
    for message, wanted in zip(messages, expected, strict=True):
        assert wanted in message
    with pytest.raises(StoreDamaged, match="position 2"):
        list(postgresql_store.read_blocks(sid))
    assert list(postgresql_store.read_blocks(sid, 4)) == [Block(4, 2, token(2) * 2)]
    assert postgresql_store.list_sessions() == []
    row = postgresql_store.get_session(named("a"))
    assert row is not None and row.settings == {}


def test_damage_is_repaired(postgresql_url: str) -> None:
    with contextlib.closing(open_store(postgresql_url)) as store:
        sids = [create(store, id_).sid for id_ in "ab"]
        for sid in sids:
            append(store, sid, 2, 1, payloads=[b"{}"] * 2)
            append(store, sid, 3, 2)
        with pytest.raises(StoreUnavailable, match="in use by another server"):
            open_for_repair(postgresql_url)
    with psql(postgresql_url) as connection:
        connection.execute(f"UPDATE blocks SET checksum = 0 WHERE log = {sids[0]} AND start = 2")
        connection.execute(f"UPDATE sessions SET settings = '1' WHERE sid = {sids[1]}")
    with contextlib.closing(open_for_repair(postgresql_url)) as store:
        repairs = store.plan_repair()
        found = [(str(repair.session), repair.length) for repair in repairs if isinstance(repair, Repair)]
        assert found == [("a", 2), ("b", None)]
        store.carry_out_repair(repairs)
        assert list(store.verify()) == []
        assert ids(store.list_sessions()) == ["a"] and read(store, sids[0]) == token(1) * 2


def test_a_large_session_is_read_in_lots(postgresql_store: Store) -> None:
    sid = create(postgresql_store).sid
    data = b"".join(bytes([number % 251]) * 40_009 for number in range(211))
    write(postgresql_store, Append(sid, 211, data))
    statements: list[str] = []

    def note(_connection: Any, cursor: Any, *_: Any) -> None:
        statements.append(type(cursor).__name__)

    with listening("before_cursor_execute", note):
        assert read(postgresql_store, sid) == data
        assert [block.start for block in postgresql_store.read_blocks(sid, 3, 6)] == [3, 4, 5]
    where, few = "Cursor", "Cursor"  # whose log the tokens are in is asked before
    assert statements == [where, "ServerCursor", where, few]


def test_weights_that_are_replaced_all_the_time_take_the_room_of_a_few(
    postgresql_url: str, postgresql_store: Store
) -> None:
    """Autovacuum comes once a minute: a learner would have filled the disk with a minute's worth of its weights."""
    for version in range(1, 13):
        row = model(postgresql_store, "m", random.Random(version).randbytes(1 << 20), version)
        assert write(postgresql_store, PutModel(row, {})) == [row]
        while postgresql_store.purge_models():
            pass
        assert postgresql_store.erase()
    with psql(postgresql_url) as connection:
        (size,) = connection.execute("SELECT pg_total_relation_size('model_parts')").fetchone() or (0,)
    assert size < 5 << 20
    assert isinstance(append(postgresql_store, create(postgresql_store).sid, 1), Appended), "it writes on"
