"""What was deleted or trimmed leaves every file of the data directory, not only the tables."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.base import (
    Append,
    Compact,
    DeleteModel,
    DeleteSession,
    KeepSketches,
    PutModel,
    SessionRow,
    Store,
    Summary,
)
from storage.databases.sqlite import REWRITTEN_BYTES
from storage.resolve import back_up, open_store
from tests.names import named
from tests.storage.contract import create, model, write

TEXT, CHUNK, NUM_SESSIONS = 200, 8, 7


def secret(kind: str, name: str, number: int) -> bytes:
    """What is looked for in the files, so long that no part of it is there by chance."""
    return f"{kind} of {name} at {number:06}, which nobody is to find. ".encode()


def payload(name: str, number: int) -> bytes:
    return b'{"text": "' + secret("text", name, number).ljust(TEXT + 13 * (number % 41)) + b'"}'


def tokens(name: str, number: int) -> bytes:
    return secret("embedding", name, number).ljust(256, b".")


def found(directory: Path, name: str, first: int = 0, stop: int = 10**6) -> list[tuple[str, str]]:
    """What there is of a session's tokens first .. stop-1 in the files of a data directory: file and kind."""
    hits = []
    for file in directory.iterdir():
        data = file.read_bytes()
        for kind in ("text", "embedding", "summary", "sketch"):
            head = f"{kind} of {name} at ".encode()
            numbers = {int(part[:6]) for part in data.split(head)[1:]}
            hits += [(file.name, kind)] * any(first <= number < stop for number in numbers)
    return hits


def fill(store: Store, names: dict[str, SessionRow], num_appends: int, seed: int = 1) -> dict[str, int]:
    """Appends to all sessions in turns, by one to three tokens, and compactions between them; the lengths.

    Pages that sessions share are split and joined all the time: SQLite leaves copies of what it moves.
    """
    draw, lengths, compacted = random.Random(seed), dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for _ in range(num_appends):
        name = draw.choice(sorted(names))
        positions = range(lengths[name], lengths[name] + draw.choice([1, 1, 3]))
        data = b"".join(tokens(name, number) for number in positions)
        bodies = [payload(name, number) for number in positions]
        trim_chunk = CHUNK if names[name].max_tokens else None
        (appended,) = write(store, Append(names[name].sid, len(positions), data, bodies, trim_chunk=trim_chunk))
        lengths[name] = positions.stop
        first = max(compacted[name], appended.first_position // CHUNK)  # type: ignore[union-attr]
        if (num_chunks := positions.stop // CHUNK - first) >= 3:
            keys, sketches = (
                b"".join(secret(kind, name, chunk * CHUNK).ljust(99) for chunk in range(first, first + num_chunks))
                for kind in ("summary", "sketch")
            )
            write(store, Compact(names[name].sid, Summary(first, num_chunks, keys), CHUNK))
            write(store, KeepSketches(names[name].sid, Summary(first, num_chunks, sketches), CHUNK, 1))
            compacted[name] = first + num_chunks
    return lengths


def sessions(store: Store, **values: int) -> dict[str, SessionRow]:
    return {name: create(store, name, **values) for name in map("session{}".format, range(NUM_SESSIONS))}


def delete(store: Store, row: SessionRow) -> None:
    write(store, DeleteSession(row.sid))
    while store.purge():
        pass


@pytest.mark.parametrize("seed", range(3))
def test_a_deleted_session_is_in_no_file(path: Path, sqlite_store: Store, seed: int) -> None:
    """It stayed in the log for minutes, and in pages of its neighbours for ever, though `secure_delete` was on."""
    rows = sessions(sqlite_store)
    lengths = fill(sqlite_store, rows, 1_500, seed)
    assert len(found(path.parent, "session2")) >= 4
    for name in ("session2", "session5"):
        delete(sqlite_store, rows.pop(name))
    assert sqlite_store.erase()
    assert found(path.parent, "session2") == found(path.parent, "session5") == []
    for name, row in rows.items():
        assert b"".join(block.data for block in sqlite_store.read_blocks(row.sid)) == b"".join(
            tokens(name, number) for number in range(lengths[name])
        )
        assert len(sqlite_store.read_payload_range(row.sid, 0, lengths[name])) == lengths[name]
    assert list(sqlite_store.verify()) == []


def test_what_was_trimmed_is_in_no_file(path: Path, sqlite_store: Store) -> None:
    """Tokens stayed in blocks, and keys in summaries, of which another part was held."""
    rows = sessions(sqlite_store, max_tokens=101)
    fill(sqlite_store, rows, 1_500)
    assert sqlite_store.erase()
    for name in rows:
        row = sqlite_store.get_session(named(name))
        assert row is not None and row.first_position > 0
        assert found(path.parent, name, 0, row.first_position) == []
        assert {kind for _, kind in found(path.parent, name, row.first_position)} == {
            *("text", "embedding", "summary", "sketch")
        }
    assert list(sqlite_store.verify()) == []


def test_weights_that_were_replaced_or_deleted_are_in_no_file(path: Path, sqlite_store: Store) -> None:
    def put(name: str, number: int) -> None:
        """Bytes that say whose they are, in every line of them."""
        data = b"".join(f"weights of {name}, {number}, line {line:06}. ".encode() for line in range(20_000))
        row = model(sqlite_store, name, data, hash((name, number)) % 2**40, num_parts=3)
        assert write(sqlite_store, PutModel(row, {})) == [row]
        while sqlite_store.purge_models():
            pass

    def are_there(what: str) -> bool:
        return any(what.encode() in file.read_bytes() for file in path.parent.iterdir())

    for number in range(3):
        put("a", number)
        put("b", number)
    write(sqlite_store, DeleteModel("default", "b"))
    while sqlite_store.purge_models():
        pass
    assert are_there("weights of b")
    assert sqlite_store.erase()
    assert are_there("weights of a, 2,")
    assert not are_there("weights of b") and not are_there("weights of a, 0,") and not are_there("weights of a, 1,")


def test_readers_are_not_waited_for_and_what_they_need_goes_after_them(path: Path, sqlite_store: Store) -> None:
    rows = sessions(sqlite_store)
    fill(sqlite_store, rows, 300)
    reading = sqlite_store.read_blocks(rows["session2"].sid)
    first = next(reading)
    delete(sqlite_store, rows["session2"])
    assert not sqlite_store.erase()
    assert found(path.parent, "session2") != []
    assert b"".join(block.data for block in [first, *reading]).count(b"embedding of session2") > 10
    assert sqlite_store.erase()
    assert found(path.parent, "session2") == []


WRITER = """if True:
    import os, signal, sys
    from pathlib import Path
    from storage.resolve import open_store
    from tests.storage.test_erasure import delete, fill, sessions
    store = open_store(sys.argv[1])
    rows = sessions(store)
    fill(store, rows, 300)
    delete(store, rows["session2"])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_did_not_erase_the_next_one_does(path: Path) -> None:
    url = f"sqlite:///{path}"
    writer = subprocess.run([sys.executable, "-c", WRITER, url], timeout=60, check=False)
    assert writer.returncode == -signal.SIGKILL
    assert found(path.parent, "session2") != []
    with contextlib.closing(open_store(url)) as store:
        assert store.erase()
        assert found(path.parent, "session2") == []


def test_a_stop_erases(path: Path) -> None:
    with contextlib.closing(open_store(f"sqlite:///{path}")) as store:
        rows = sessions(store)
        fill(store, rows, 300)
        delete(store, rows["session2"])
    assert found(path.parent, "session2") == []


def test_a_backup_holds_nothing_that_was_deleted(path: Path, sqlite_store: Store, tmp_path: Path) -> None:
    """Of a database too large to be rewritten while others wait."""
    rows = sessions(sqlite_store)
    fill(sqlite_store, rows, 1_500)
    large = create(sqlite_store, "large")
    write(sqlite_store, Append(large.sid, REWRITTEN_BYTES // 4_096, os.urandom(REWRITTEN_BYTES)))
    delete(sqlite_store, rows["session2"])
    assert sqlite_store.erase()
    back_up(path.parent, tmp_path / "copy")
    assert found(tmp_path / "copy", "session2") == []
    assert found(tmp_path / "copy", "session3") != []


def test_nothing_deleted_nothing_done(path: Path, sqlite_store: Store) -> None:
    """Appends pay for no folding in of the log where nobody deletes."""
    assert sqlite_store.erase()
    fill(sqlite_store, sessions(sqlite_store), 100)
    assert sqlite_store.erase()
    assert path.with_name(path.name + "-wal").stat().st_size > 0
