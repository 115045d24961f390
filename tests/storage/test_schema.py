"""The schema: databases made by earlier releases, the tables against the migrations, how Alembic is run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from storage.base import (
    DEFAULT_NAMESPACE,
    Append,
    Appended,
    Block,
    CreateSession,
    KeyRow,
    Quota,
    QuotaExceeded,
    SessionFull,
    SessionRow,
    StoreUnavailable,
    Summary,
)
from storage.resolve import open_readonly, open_store
from storage.sql.tables import metadata

DATA = Path(__file__).parent / "data"
VERSIONS = Path(__file__).parents[2] / "storage" / "migrations" / "versions"
KEPT = {
    "0001": "1dc2a1d67a7f800e8ac1a680a04115f5ae6b935f0f40f9bea0576a30f14d2600",
    "0002": "75ffa64611d41db7cde11fab89758ca0a81103f0381ad61db812d677d2dc55ed",
    "0003": "8f405944edd704fda32f0e38ceec30c9f52a8aef7424fb9e3beb69b402d23615",
    "0004": "796c5dfc62a0cfe39fb7976d200632abef85c54b66daa7da383e11ec8d2f24df",
    "0005": "3e113cb7b4a42fbc097b1552198581aba17f2f808ae9a6502ff2dd3650731043",
    "0006": "7c869c95024a223c1258ae54996cc84e4b5fc4458d4a250640dad1acc62afec5",
    "0007": "61696c0c4baec04d3c91b1de6e93a33cf783c2341b32261c8c8a08eb1c8fff82",
    "0008": "2373aeb62cff98443d72d67fd8ffd6348047a3012c57ef72c10c25b9ac398e18",
    "0009": "4c666d4ca4a233835c8baa82f187773028d91c52bcbf7d67b7a818a3d7d6a37e",
    "0010": "575387440385ace7e706377e158854a9db1da08255991d92492a495866e11e17",
    "0011": "8332504e8c612cced4ee97e4cd2e47931e42fa203298f36a5e22a317dfce5afa",
    "0012": "fa02f9048dc998c2a0fc60be0e45585b8f8895d01a95a75116ae8077edfdd136",
    "0013": "fb0d4a4358f775bbc22ae4ede8ef42c4a8ec3169bfca8fe20577e6377dd51572",
}
"""Schema versions and the SHA-256 of a database that was made by each, once, with `golden.py`. They stand for the
databases people have, so they are never made again; a new schema version gets a file of its own. The last append of
0005 is in the journal that it had; those since 0008 hold a session of another namespace, since 0009 a caller's key,
since 0010 a quota, since 0011 a model, since 0012 a fork, since 0013 sketches."""


def definitions(path: Path) -> dict[str, str | None]:
    """The statements that make up a database's schema."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT name, sql FROM sqlite_schema"))


def parts(statement: str | None) -> list[str]:
    """A statement's words, column by column, in any order: SQLite puts an added column behind the constraints."""
    if statement is None:
        return []
    head, _, rest = statement.partition("(")
    body, _, tail = rest.rpartition(")")
    return [head.strip(), *sorted(" ".join(part.split()) for part in re.split(r",(?![^(]*\))", body)), tail.strip()]


@pytest.fixture(params=KEPT)
def kept(request: pytest.FixtureRequest) -> Path:
    file = DATA / f"v{request.param}.sqlite3"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == KEPT[request.param], "the kept file must stay as it is"
    return file


@pytest.fixture
def kept_copy(kept: Path, path: Path) -> Path:
    path.parent.mkdir()
    shutil.copy(kept, path)
    return path


def test_todays_code_reads_a_kept_database(kept_copy: Path) -> None:
    with contextlib.closing(open_store(f"sqlite:///{kept_copy}")) as store:
        settings = {"dim": 2, "dtype": "float16", "labels": {"kept": "yes"}}
        row = SessionRow("golden", settings, 1.0, max_tokens=100, sid=1, length=3, num_bytes=12, updated_at=2.0)
        assert store.list_sessions(DEFAULT_NAMESPACE) == [row]
        assert list(store.read_blocks(1)) == [
            Block(0, 2, b"\x00\x3c\x00\x40\x00\x42\x00\x44", 7),
            Block(2, 1, b"\x00\x45\x00\x46"),
        ]
        assert store.read_payload_range(1, 0, 3) == {1: b'{"text": "\xc3\xbc"}'}
        again = Append(1, 1, b"\x00\x45\x00\x46", idempotency_key="k", digest=b"d")
        replayed, added, full = store.write([again, Append(1, 1, bytes(4)), Append(1, 97, bytes(388))], now=3.0)
        assert replayed == Appended(2, 3, replayed=True)
        assert added == Appended(3, 4)
        assert isinstance(full, SessionFull)
        assert list(store.verify()) == []


def test_what_kept_databases_hold_besides_is_still_there(kept: Path, kept_copy: Path) -> None:
    version = kept.stem[1:]
    other = SessionRow("golden", {"dim": 3}, 1.5, sid=2, updated_at=1.5, namespace="ana")
    key = KeyRow("ana", "laptop", bytes(range(32)), "write", 1.0, 9.0, 2.5)
    with contextlib.closing(open_store(f"sqlite:///{kept_copy}")) as store:
        assert store.list_sessions("ana") == [other] * (version >= "0008")
        assert store.list_keys() == [key] * (version >= "0009")
        assert store.get_quota("ana") == (Quota("ana", 5, None, 1_000) if version >= "0010" else Quota("ana"))
        full = store.write([Append(other.sid, 1, bytes(1_001))], now=3.0)[0] if version >= "0008" else None
        assert isinstance(full, QuotaExceeded) == (version >= "0010")
        models = store.list_models()
        assert [(one.name, store.read_model(one)) for one in models] == [("planner", b"weights")] * (version >= "0011")
        sketches = [Summary(0, 1, b"sketches")] if version >= "0013" else []
        assert list(store.read_sketches(1, 5)) == sketches
        forks = store.list_sessions("bea")
        assert [(row.id, row.length) for row in forks] == [("golden", 2)] * (version >= "0012")
        for fork in forks:
            assert [block.data for block in store.read_blocks(fork.sid)] == [b"\x00\x3c\x00\x40\x00\x42\x00\x44"]


def test_an_upgraded_database_is_as_a_new_one(kept_copy: Path, tmp_path: Path) -> None:
    open_store(f"sqlite:///{kept_copy}").close()
    open_store(f"sqlite:///{tmp_path}/new.sqlite3").close()
    assert definitions(kept_copy) == definitions(tmp_path / "new.sqlite3")


def test_no_sid_is_used_again_after_an_upgrade(kept_copy: Path) -> None:
    """SQLite cannot change what is unique in a table: sessions are moved into another one, which knows the last sid."""
    with contextlib.closing(sqlite3.connect(kept_copy)) as connection, connection:
        assert connection.execute("UPDATE sqlite_sequence SET seq = 41 WHERE name = 'sessions'").rowcount == 1
    with contextlib.closing(open_store(f"sqlite:///{kept_copy}")) as store:
        (row,) = store.write([CreateSession(SessionRow("b", {}, 1.0))], now=1.0)
        assert isinstance(row, SessionRow) and row.sid == 42


def test_a_kept_database_is_left_alone_until_it_is_opened_for_writing(kept: Path, kept_copy: Path) -> None:
    is_of_today = kept.stem[1:] == max(file.stem[1:5] for file in VERSIONS.glob("v*.py"))
    if not is_of_today:
        with pytest.raises(StoreUnavailable, match=f"version {kept.stem[1:]}; start the server once to upgrade it"):
            open_readonly(kept_copy)
    assert kept_copy.read_bytes() == kept.read_bytes()
    open_store(f"sqlite:///{kept_copy}").close()
    with contextlib.closing(open_readonly(kept_copy)) as store:
        assert list(store.verify()) == []


def test_the_migrations_make_the_tables(path: Path, tmp_path: Path) -> None:
    """By Alembic's comparison, and, for what that does not compare, by the statements."""
    open_store(f"sqlite:///{path}").close()
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    engine = create_engine(f"sqlite:///{tmp_path}/tables.sqlite3")
    metadata.create_all(engine)
    engine.dispose()
    migrated = {name: parts(sql) for name, sql in definitions(path).items() if "alembic_version" not in name}
    assert migrated == {name: parts(sql) for name, sql in definitions(tmp_path / "tables.sqlite3").items()}


def test_opening_leaves_logging_alone(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Alembic's templates configure the root logger; ours must not."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers), logging.getLogger("alembic").level, logging.root.manager.disable)
    open_store(f"sqlite:///{path}").close()
    after = (root.level, list(root.handlers), logging.getLogger("alembic").level, logging.root.manager.disable)
    assert before == after
    assert capfd.readouterr() == ("", "")


def test_stores_may_be_opened_at_the_same_time(tmp_path: Path) -> None:
    """Alembic keeps what it runs in a global."""
    failures: list[Exception] = []

    def open_one(number: int) -> None:
        try:
            with contextlib.closing(open_store(f"sqlite:///{tmp_path}/{number}/htm.sqlite3")) as store:
                assert store.totals().num_sessions == 0
        except Exception as error:  # told below: a thread's exception fails no test by itself
            failures.append(error)

    threads = [threading.Thread(target=open_one, args=[number]) for number in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("how", ["entries = x'', entries_again = x''", "data = x''"])
def test_a_damaged_row_of_the_journal_is_lost_and_said(path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing else is: it held the last append of its session, which is now as it was before that."""
    path.parent.mkdir()
    shutil.copy(DATA / "v0005.sqlite3", path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f"UPDATE journal SET {how}")
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        (row,) = store.list_sessions()
        assert (row.length, row.num_bytes) == (2, 8)
        assert list(store.verify()) == []
    assert "row 1 of the journal cannot be read" in caplog.text and "its appends are lost" in caplog.text


def test_one_copy_of_a_row_of_the_journal_is_enough(path: Path) -> None:
    path.parent.mkdir()
    shutil.copy(DATA / "v0005.sqlite3", path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE journal SET entries = x'00'")
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        assert [row.length for row in store.list_sessions()] == [3]
