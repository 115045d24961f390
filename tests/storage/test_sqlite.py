"""SQLite keeps the contract, through reopening, crashes, damage, a full disk and a second server."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sqlalchemy import create_engine

from storage import group
from storage.base import (
    Append,
    Appended,
    CreateSession,
    DeleteSession,
    SessionRow,
    Store,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from storage.memory import MemoryStore
from storage.resolve import open_readonly, open_store
from storage.tables import metadata
from tests.storage.contract import StoreContract, data_of, make, one

GOLDEN = Path(__file__).parent / "data" / "v0001.sqlite3"


def url_of(path: Path) -> str:
    return f"sqlite:///{path / 'htm.sqlite3'}"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(url_of(tmp_path))
    yield store
    store.close()


class TestSqliteStore(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = open_store(url_of(tmp_path))
        yield store
        store.close()


class Comparison(RuleBasedStateMachine):
    """Random writes on SQLite and on the store in memory, with reopening between: equal outcomes and contents."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.directory = Path(tempfile.mkdtemp())
        self.ours, self.model = open_store(url_of(self.directory)), MemoryStore()
        self.now = 0.0

    @rule(
        writes=st.lists(
            st.one_of(
                st.builds(
                    CreateSession,
                    st.builds(
                        SessionRow,
                        st.sampled_from(["a", "b"]),
                        st.just({"labels": {}}),
                        st.just(1.0),
                        max_tokens=st.sampled_from([None, 4]),
                    ),
                ),
                st.builds(DeleteSession, st.integers(1, 5)),
                st.builds(
                    lambda sid, data, key, length: Append(
                        sid, len(data), data, [b"{}", *[None] * (len(data) - 1)], None, length, key, data
                    ),
                    st.integers(1, 5),
                    st.binary(min_size=1, max_size=3),
                    st.sampled_from([None, "k", "l"]),
                    st.sampled_from([None, 0, 1, 2]),
                ),
            ),
            max_size=6,
        )
    )
    def write(self, writes: list[Any]) -> None:
        self.now += 1
        ours, theirs = (store.write(writes, now=self.now) for store in (self.ours, self.model))
        for our, their in zip(ours, theirs, strict=True):
            assert type(our) is type(their) and (our == their or isinstance(our, Exception)), (our, their)

    @rule()
    def reopen(self) -> None:
        self.ours.close()
        self.ours = open_store(url_of(self.directory))

    @rule(seconds=st.sampled_from([10.0, 90_000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def teardown(self) -> None:
        if not hasattr(self, "ours"):
            return
        rows = self.ours.list_sessions()
        assert rows == self.model.list_sessions()
        for row in rows:
            assert data_of(self.ours, row.sid) == data_of(self.model, row.sid)
            assert self.ours.read_payload_range(row.sid, 0, 99) == self.model.read_payload_range(row.sid, 0, 99)
        assert list(self.ours.verify()) == []
        self.ours.close()
        shutil.rmtree(self.directory)


Comparison.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
TestComparison = Comparison.TestCase


def connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path / "htm.sqlite3", isolation_level=None)


def test_pragmas_and_schema(store: Store, tmp_path: Path) -> None:
    make(store, "s")
    raw = connect(tmp_path)
    values = [raw.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "page_size", "auto_vacuum")]
    assert values == ["wal", 16_384, 2]
    raw.close()
    engine = create_engine(f"sqlite:///{tmp_path / 'htm.sqlite3'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    writer = store._writer  # type: ignore[attr-defined]
    assert [writer.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("synchronous", "secure_delete")] == [2, 1]
    writer.rollback()


def test_a_database_of_the_first_version_is_read_to_the_byte(tmp_path: Path) -> None:
    """The kept file was written by version 0001: `python -m tests.storage.golden`."""
    shutil.copy(GOLDEN, tmp_path / "htm.sqlite3")
    store = open_store(url_of(tmp_path))
    (row,) = store.list_sessions()
    assert (row.id, row.length, row.num_bytes, row.max_tokens) == ("golden", 3, 12, 100)
    assert row.settings == {"dim": 2, "dtype": "float16", "labels": {"kept": "yes"}}
    blocks = list(store.read_blocks(row.sid))
    assert [(b.start, b.num_tokens, b.data, b.episode) for b in blocks] == [
        (0, 2, b"\x00\x3c\x00\x40\x00\x42\x00\x44", 7),
        (2, 1, b"\x00\x45\x00\x46", None),
    ]
    assert store.read_payload_range(row.sid, 0, 3) == {1: b'{"text": "\xc3\xbc"}'}
    assert one(store, Append(row.sid, 1, b"x", idempotency_key="k", digest=b"d"), now=50.0).replayed  # type: ignore[union-attr]
    assert list(store.verify()) == []
    store.close()


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="begins with 'mysql'"):
        open_store("mysql://x")
    (tmp_path / "htm.sqlite3").write_bytes(b"this is no database, " * 100)
    with pytest.raises(StoreUnavailable, match=r"htm\.sqlite3 cannot be opened: .*not a database"):
        open_store(url_of(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot be used as data directory"):
        open_store(url_of(tmp_path / "file"))
    with pytest.raises(StoreUnavailable, match="there is no database"):
        open_readonly(tmp_path / "nowhere")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    open_store(url_of(tmp_path)).close()
    raw = connect(tmp_path)
    raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(StoreUnavailable, match=r"schema version 9999.*newer"):
        open_store(url_of(tmp_path))
    with pytest.raises(StoreUnavailable, match="schema version 9999"):
        open_readonly(tmp_path)


def test_a_second_server_is_refused_and_a_reader_is_not(store: Store, tmp_path: Path) -> None:
    sid = make(store, "s").sid
    one(store, Append(sid, 1, b"a"))
    code = f"from storage.resolve import open_store; open_store({url_of(tmp_path)!r})"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode == 1 and f"{tmp_path} is in use by another server, process" in second.stderr
    reader = open_readonly(tmp_path)
    assert data_of(reader, sid) == b"a" and list(reader.verify()) == []
    with pytest.raises(StoreError, match="reading only"):
        one(reader, Append(sid, 1, b"b"))
    reader.close()
    store.close()
    closed = open_readonly(tmp_path)
    assert closed.totals().num_tokens == 1
    closed.close()


def test_a_full_disk_refuses_the_group_and_nothing_else(store: Store) -> None:
    sid = make(store, "s").sid
    one(store, Append(sid, 1, b"a"))
    writer = store._writer  # type: ignore[attr-defined]
    pages = writer.exec_driver_sql("PRAGMA page_count").scalar()
    writer.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    writer.rollback()
    with pytest.raises(StoreFull, match="disk is full"):
        store.write([Append(sid, 1, b"b"), Append(sid, 1, bytes(200_000))], now=1)
    assert one(store, Append(sid, 1, b"c")) == Appended(1, 2)
    assert data_of(store, sid) == b"ac" and list(store.verify()) == []


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("UPDATE blocks SET data = x'00' WHERE start = 0", ("s", "does not match its checksum")),
        ("UPDATE blocks SET start = 7 WHERE start = 2", ("s", "begins at position 7, 2 was expected")),
        ("UPDATE sessions SET length = 9", ("s", "end at position 3, its length is 9")),
        ("UPDATE sessions SET num_bytes = 9", ("s", "hold 3 bytes, 9 are recorded")),
        ("UPDATE payloads SET position = 3", ("s", "1 payloads lie outside its 3 tokens")),
        ("INSERT INTO payloads VALUES (99, 0, x'00')", (None, "1 rows of table payloads belong to no session")),
    ],
)
def test_verify_finds(store: Store, tmp_path: Path, damage: str, found: tuple[str | None, str]) -> None:
    sid = make(store, "s").sid
    store.write([Append(sid, 2, b"ab", payloads=[b"{}", None]), Append(sid, 1, b"c")], now=1)
    raw = connect(tmp_path)
    raw.execute(damage)
    raw.close()
    problems = list(store.verify())
    assert any(problem.session_id == found[0] and found[1] in problem.message for problem in problems), problems


def test_a_damaged_block_is_not_read(store: Store, tmp_path: Path) -> None:
    sid, other = make(store, "s").sid, make(store, "t").sid
    store.write([Append(sid, 2, b"ab"), Append(sid, 1, b"c"), Append(other, 1, b"d")], now=1)
    raw = connect(tmp_path)
    raw.execute("UPDATE blocks SET data = x'00' WHERE start = 2")
    raw.close()
    with pytest.raises(StoreDamaged, match="session 's' is damaged at position 2"):
        data_of(store, sid)
    assert data_of(store, other) == b"d" and data_of(store, sid, 0, 2) == b"ab"


def test_deleted_space_is_given_back(store: Store, tmp_path: Path) -> None:
    sid = make(store, "s").sid
    for _ in range(20):
        one(store, Append(sid, 100, bytes(400_000)))
    one(store, DeleteSession(sid))
    store.close()
    assert (tmp_path / "htm.sqlite3").stat().st_size < 400_000
    assert not (tmp_path / "htm.sqlite3-wal").exists()


def test_long_appends_are_several_blocks(store: Store) -> None:
    sid = make(store, "s").sid
    num_tokens = 3 * group.BLOCK_BYTES // 1000 + 1
    one(store, Append(sid, num_tokens, bytes(1000 * num_tokens)))
    blocks = list(store.read_blocks(sid))
    assert len(blocks) == 4 and max(len(block.data) for block in blocks) <= group.BLOCK_BYTES


def test_readers_see_whole_groups_while_writing(store: Store) -> None:
    sids = [make(store, f"s{i}").sid for i in range(3)]
    torn: list[object] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            lengths = {row.length for row in store.list_sessions()}
            if len(lengths) != 1:
                torn.append(lengths)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        store.write([Append(sid, 1, b"x") for sid in sids], now=1)
    stop.set()
    for thread in threads:
        thread.join()
    assert torn == []


WRITER = """
import sys
from storage.base import *
from storage.resolve import open_store
store = open_store(sys.argv[1])
row = store.get_session("s") or store.write([CreateSession(SessionRow("s", {}, 1.0))], now=1.0)[0]
while True:
    length = store.get_session("s").length
    group = [Append(row.sid, 2, bytes([(length + 2 * i) % 251] * 2000)) for i in range(5)]
    store.write(group, now=1.0)
    print(length + 10, flush=True)
"""


def test_kill_9_between_and_within_groups(tmp_path: Path) -> None:
    told = 0
    for round_number in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, url_of(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(5 + 3 * round_number):
            told = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        told = max([told, *map(int, writer.stdout.read().split())])
        writer.wait()
        writer.stdout.close()
        store = open_store(url_of(tmp_path))
        row = store.get_session("s")
        assert row is not None and row.length in {told, told + 10}
        expected = b"".join(bytes([position % 251] * 2000) for position in range(0, row.length, 2))
        assert data_of(store, row.sid) == expected and list(store.verify()) == []
        store.close()
