"""What a disk may hold after the power went: what was synced, and any part of what was not.

`log_writes.c` logs the writes and syncs of a running server's database. From the log, the files at any moment are
built again: a write is there for certain when a sync of its file began after it had ended and was done before that
moment; any other write that had begun may be there whole, in part, or not at all, whatever the others are.
That the database and its write-ahead log were made counts as certain. Rollback journals come and go while the
database is made: which of them is there depends on how often the directory was synced.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECTOR_BYTES = 4_096
"""A disk writes so many bytes whole or not at all."""
NAMES = {1: "htm.sqlite3", 2: "htm.sqlite3-wal", 3: "htm.sqlite3-journal"}
JOURNAL, DIRECTORY = 3, 4
_RECORD = struct.Struct("ddqqii")


@dataclass(frozen=True, slots=True)
class Operation:
    """One write (`w`), truncation (`t`) or sync (`s`) of a file of NAMES, or its creation (`c`) or end (`u`).

    Times are as of `time.monotonic`.
    """

    began_at: float
    ended_at: float
    offset: int
    size: int
    kind: str
    file: int
    data: bytes


def build_shim(directory: Path, source: str = "log_writes.c") -> Path | None:
    """The library to preload, of a file beside this one; None where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = directory / f"{source}.so"
    command = [
        compiler,
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        str(library),
        str(Path(__file__).with_name(source)),
        "-ldl",
    ]
    subprocess.run([*command, "-lpthread"], check=True)
    return library


def read_log(path: Path) -> list[Operation]:
    """All operations whose records are whole, in the order in which they ended."""
    log, place, operations = path.read_bytes(), 0, []
    while place + _RECORD.size <= len(log):
        began_at, ended_at, offset, size, kind, file = _RECORD.unpack_from(log, place)
        place += _RECORD.size
        num_bytes = size if chr(kind) == "w" else 0
        operations.append(Operation(began_at, ended_at, offset, size, chr(kind), file, log[place : place + num_bytes]))
        place += num_bytes
    return operations


def cut_power(operations: Sequence[Operation], at: float, draw: random.Random, directory: Path) -> None:
    """Write the files as a disk may hold them when the power goes at that moment."""
    share = draw.choice([0.0, 0.5, 0.9, 1.0])
    for file, name in NAMES.items():
        own = [operation for operation in operations if operation.file == file and operation.began_at < at]
        if file == JOURNAL:
            own = _of_present_journal(own, _last_sync_at(operations, DIRECTORY, at), draw)
            if not own:
                continue
        (directory / name).write_bytes(_content(own, _last_sync_at(own, file, at), share, draw))


def _last_sync_at(operations: Sequence[Operation], file: int, at: float) -> float:
    """When the last sync of a file began that was done by then; 0 when there was none."""
    syncs = [operation for operation in operations if operation.kind == "s" and operation.file == file]
    return max((sync.began_at for sync in syncs if sync.ended_at < at), default=0.0)


def _of_present_journal(own: Sequence[Operation], synced_at: float, draw: random.Random) -> list[Operation]:
    """What was done to the journal that the directory names, which changes in order; nothing when it names none."""
    changes = [place for place, operation in enumerate(own) if operation.kind in "cu"]
    num_certain = sum(own[place].ended_at <= synced_at for place in changes)
    num_kept = draw.randint(num_certain, len(changes))
    if not num_kept or own[changes[num_kept - 1]].kind == "u":
        return []
    end = changes[num_kept] if num_kept < len(changes) else len(own)
    return list(own[changes[num_kept - 1] : end])


def _content(own: Sequence[Operation], last_sync_at: float, share: float, draw: random.Random) -> bytes:
    """What a file holds of the operations on it, all of those that were synced and a `share` of the others."""
    content = bytearray()
    for operation in own:
        if operation.kind in "scu":
            continue
        is_certain = operation.ended_at <= last_sync_at
        if operation.kind == "t":
            if is_certain or draw.random() < share:
                _resize(content, operation.size)
        elif is_certain:
            _write(content, operation.offset, operation.data)
        elif draw.random() < share:
            _write_in_part(content, operation, draw)
    return bytes(content)


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _write_in_part(content: bytearray, operation: Operation, draw: random.Random) -> None:
    """Whole, or some of its sectors."""
    if draw.random() < 0.5:
        _write(content, operation.offset, operation.data)
        return
    place = 0
    while place < operation.size:
        stop = min(operation.size, place + SECTOR_BYTES - (operation.offset + place) % SECTOR_BYTES)
        if draw.random() < 0.5:
            _write(content, operation.offset + place, operation.data[place:stop])
        place = stop
