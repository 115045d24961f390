"""Any order of writes, refusals and restarts leaves a store as a model made of dicts says."""

from __future__ import annotations

import copy
import itertools
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy.exc import DBAPIError

from storage.base import (
    IDEMPOTENCY_SECONDS,
    Append,
    Appended,
    Compact,
    CreateSession,
    DeleteSession,
    Fork,
    KeepSketches,
    KeyReused,
    KeyWrite,
    ModelWrite,
    NoSuchSession,
    Refused,
    SessionExists,
    SessionFull,
    SessionRow,
    SetQuota,
    Store,
    StoreError,
    Summary,
    Truncate,
    UpdateSession,
    Write,
    WriteResult,
    WrongLength,
)
from storage.resolve import open_store
from storage.sql import prepared
from tests.databases import new_database

NAMESPACES = ("default", "b")
IDS = ("a", "a%", "b", "ключ", "\U0001f600")
TOKEN = b"token!!"
SIZE = 3
"""Tokens of a chunk."""


@dataclass
class Session:
    """What the model knows of one session."""

    row: SessionRow
    """Without its bytes: how blocks are cut, and so how much of them an trim leaves, is the store's affair."""
    tokens: bytes = b""
    """All that were appended, trimmed ones included."""
    payloads: dict[int, bytes] = field(default_factory=dict)
    keys: dict[str, tuple[bytes, Appended, float]] = field(default_factory=dict)
    num_sealed: int = 0
    """Chunks of which summaries are kept, or were until they were trimmed."""
    sketches: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """By chunk, with their versions."""
    has_branched: bool = False
    """Whether others may share its tokens: then their compaction and sketches are its own too."""


UNKNOWN = SessionRow("unknown", {}, 0.0)
"""What this model does not say of a compaction."""


sids = st.integers(1, 3)
"""Few, so that most writes find a session, and often one that has been written before."""
creates = st.builds(
    lambda namespace, id_, max_tokens, label: CreateSession(
        SessionRow(id_, {"labels": {"l": label}}, 5.0, max_tokens=max_tokens, updated_at=5.0, namespace=namespace)
    ),
    st.sampled_from(NAMESPACES),
    st.sampled_from(IDS),
    st.none() | st.integers(0, 13),
    st.sampled_from("xy"),
)
appends = st.builds(
    lambda sid, payloads, if_length, key, digest, byte, trim_chunk: Append(
        sid,
        len(payloads),
        bytes([byte]) * len(TOKEN) * len(payloads),
        payloads=payloads,
        if_length=if_length,
        idempotency_key=key,
        digest=digest,
        trim_chunk=trim_chunk,
    ),
    sids,
    st.lists(st.none() | st.binary(max_size=3), min_size=1, max_size=5),
    st.none() | st.integers(0, 7),
    st.none() | st.sampled_from(["k", "K'"]),
    st.sampled_from([b"d", b"e"]),
    st.integers(0, 255),
    st.sampled_from([None, SIZE]),
)
updates = st.builds(lambda sid, n: UpdateSession(sid, {"labels": {}, "n": n}), sids, st.integers())
deletes = st.builds(DeleteSession, sids)
compacts = st.builds(
    lambda sid, first, num_chunks: Compact(sid, Summary(first, num_chunks, b"s"), SIZE),
    sids,
    st.integers(0, 3),
    st.integers(1, 2),
)
sketches = st.builds(
    lambda sid, first, data, version: KeepSketches(sid, Summary(first, len(data), data), SIZE, version),
    sids,
    st.integers(0, 3),
    st.binary(min_size=1, max_size=3),
    st.integers(1, 2),
)
lengths = st.integers(0, 13)
forks = st.builds(
    lambda sid, namespace, id_, length: Fork(
        sid, SessionRow(id_, {"labels": {}}, 5.0, namespace=namespace), SIZE, length
    ),
    sids,
    st.sampled_from(NAMESPACES),
    st.sampled_from(IDS),
    st.none() | lengths,
)
truncates = st.builds(
    lambda sid, length, if_length: Truncate(sid, length, SIZE, if_length), sids, lengths, lengths | st.none()
)
changes = st.one_of(creates, appends, appends, appends, updates, deletes, compacts, sketches, forks, truncates)
groups = st.lists(changes, max_size=9)


class StoreMachine(RuleBasedStateMachine):
    """The store and the model get the same groups."""

    is_durable = True

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.store = self.open()
        self.model: dict[int, Session] = {}
        self.last_sid = 0
        self.now = 10.0

    def open(self) -> Store:
        if not self.is_durable:
            return open_store("memory://")
        path = self.directory / "htm.sqlite3"
        return open_store(f"sqlite:///{path}" if path.exists() else new_database(path))

    @rule(group=groups)
    def write(self, group: list[Write]) -> None:
        self.now += 1
        expected = [self.apply(write) for write in group]
        self.compare(self.store.write(group, now=self.now), expected)

    def compare(self, outcomes: list[WriteResult], expected: list[WriteResult]) -> None:
        for outcome, wanted in zip(outcomes, expected, strict=True):
            if isinstance(wanted, Refused):
                assert type(outcome) is type(wanted)
                assert vars(outcome) == vars(wanted)
            elif wanted is UNKNOWN:
                assert isinstance(outcome, SessionRow | WrongLength)
            else:
                assert known(outcome) == wanted

    @rule()
    def purge(self) -> None:
        while self.store.purge():
            pass

    @rule(seconds=st.sampled_from([3600.0, IDEMPOTENCY_SECONDS / 2, IDEMPOTENCY_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.is_durable and self.last_sid > 0)
    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.open()

    @precondition(lambda self: self.is_durable and self.last_sid > 0)
    @rule()
    def crash(self) -> None:
        """Go on with the files as they are while the store is open."""
        left = self.directory
        self.directory = Path(tempfile.mkdtemp())
        shutil.copytree(left, self.directory, dirs_exist_ok=True)
        self.store.close()
        shutil.rmtree(left)
        self.store = self.open()

    @invariant()
    def the_store_is_as_the_model(self) -> None:
        rows = sorted((session.row for session in self.model.values()), key=lambda row: row.key)
        assert [known(row) for row in self.store.list_sessions()] == rows
        for namespace in NAMESPACES:
            inside = [row for row in rows if row.namespace == namespace]
            assert [known(row) for row in self.store.list_sessions(namespace)] == inside
            totals = self.store.totals(namespace)
            assert (totals.num_sessions, totals.num_disk_bytes) == (len(inside), 0)
            assert totals.num_tokens == sum(row.length - row.first_position for row in inside)
        for label in "xy":
            wanted = [row for row in rows if row.settings["labels"].get("l") == label]
            assert [known(row) for row in self.store.list_sessions(labels={"l": label})] == wanted
        num_bytes = 0
        for sid, session in self.model.items():
            start, first = None, session.row.first_position
            held = b""
            for block in self.store.read_blocks(sid):
                assert start in (None, block.start), "blocks follow each other"
                start = block.start + block.num_tokens
                held += block.data[max(0, first - block.start) * len(TOKEN) :]
                num_bytes += len(block.data)
            assert held == session.tokens[first * len(TOKEN) :]
            assert start in (None, session.row.length)
            assert self.store.read_payload_range(sid, 0, 10**6) == session.payloads
            if not session.has_branched:
                assert self.sketches_of(sid) == session.sketches
            row = self.store.get_session(session.row.key)
            assert row is not None and row.num_bytes == sum(len(block.data) for block in self.store.read_blocks(sid))
        assert self.store.totals().num_bytes == num_bytes

    def sketches_of(self, sid: int) -> dict[int, tuple[int, bytes]]:
        return {
            kept.first + at: (version, kept.data[at : at + 1])
            for version in (1, 2)
            for kept in self.store.read_sketches(sid, version)
            for at in range(kept.num_chunks)
        }

    def teardown(self) -> None:
        problems = list(self.store.verify())
        self.store.close()
        shutil.rmtree(self.directory)
        assert problems == []

    def apply(self, write: Write) -> WriteResult:
        if isinstance(write, CreateSession):
            if any(session.row.key == write.row.key for session in self.model.values()):
                return SessionExists()
            self.last_sid += 1
            row = replace(write.row, sid=self.last_sid)
            self.model[row.sid] = Session(row)
            return row
        assert not isinstance(write, KeyWrite | SetQuota | ModelWrite), "this machine is about sessions"
        session = self.model.get(write.sid)
        if session is None:
            return NoSuchSession()
        if isinstance(write, Append):
            return self.append(session, write)
        if isinstance(write, Fork):
            return self.fork(session, write)
        if isinstance(write, Truncate):
            return self.truncate(session, write)
        if isinstance(write, UpdateSession):
            session.row = replace(session.row, settings=write.settings)
        elif isinstance(write, Compact):
            if session.has_branched:
                return UNKNOWN
            end = max(session.num_sealed, session.row.first_position // SIZE)
            if write.summary.first != end:
                return WrongLength(end)
            session.num_sealed = end + write.summary.num_chunks
        elif isinstance(write, KeepSketches):
            new = {
                write.sketches.first + at: (write.version, bytes([one])) for at, one in enumerate(write.sketches.data)
            }
            session.sketches |= {
                chunk: kept for chunk, kept in new.items() if chunk >= session.row.first_position // SIZE
            }
        elif isinstance(write, DeleteSession):
            del self.model[write.sid]
        return session.row

    def fork(self, parent: Session, write: Fork) -> WriteResult:
        length = parent.row.length if write.length is None else write.length
        if not parent.row.first_position <= length <= parent.row.length:
            return WrongLength(parent.row.length)
        created = self.apply(CreateSession(write.row))
        if isinstance(created, SessionRow):
            row = replace(created, length=length, first_position=parent.row.first_position, updated_at=5.0)
            tokens, payloads = parent.tokens[: length * len(TOKEN)], parent.payloads.items()
            kept = {position: body for position, body in payloads if position < length}
            self.model[row.sid] = Session(row, tokens, kept, has_branched=True)
            parent.has_branched = True
            return row
        return created

    def truncate(self, session: Session, write: Truncate) -> WriteResult:
        row, length = session.row, write.length
        is_right = length == 0 or row.first_position <= length <= row.length
        if write.if_length not in (None, row.length) or not is_right:
            return WrongLength(row.length)
        session.tokens = session.tokens[: length * len(TOKEN)]
        session.payloads = {at: body for at, body in session.payloads.items() if at < length}
        session.keys = {key: kept for key, kept in session.keys.items() if kept[1].length <= length}
        session.num_sealed = min(session.num_sealed, length // SIZE)
        session.sketches = {chunk: kept for chunk, kept in session.sketches.items() if chunk < length // SIZE}
        first = min(row.first_position, length)
        session.row = replace(row, length=length, first_position=first, updated_at=self.now)
        return session.row

    def append(self, session: Session, write: Append) -> WriteResult:
        row, key = session.row, write.idempotency_key
        if key in session.keys and key is not None:
            digest, answer, at = session.keys[key]
            if self.now - at < IDEMPOTENCY_SECONDS:
                return Appended(answer.start, answer.length, replayed=True) if digest == write.digest else KeyReused()
        if write.if_length not in (None, row.length):
            return WrongLength(row.length)
        length, first = row.length + write.num_tokens, row.first_position
        while row.max_tokens is not None and length - first > row.max_tokens:
            first += write.trim_chunk or length
            if first > row.length:
                return SessionFull(row.length, row.max_tokens)
        session.tokens += write.data
        session.payloads = {at: body for at, body in session.payloads.items() if at >= first}
        session.sketches = {chunk: kept for chunk, kept in session.sketches.items() if chunk >= first // SIZE}
        for place, payload in enumerate(write.payloads or []):
            if payload is not None:
                session.payloads[row.length + place] = payload
        answer = Appended(row.length, length, first_position=first)
        if key is not None:
            session.keys[key] = (write.digest, answer, self.now)
        session.row = replace(row, length=length, first_position=first, updated_at=self.now)
        return answer


def known(outcome: WriteResult) -> WriteResult:
    """Without what the model does not know."""
    return replace(outcome, num_bytes=0) if isinstance(outcome, SessionRow) else outcome


class FailingMachine(StoreMachine):
    """The same with statements that fail."""

    @rule(group=groups, at=st.integers(1, 5))
    def fail(self, group: list[Write], at: int) -> None:
        """Nothing of a group is written when one of its statements fails (the first one looks who the owner is)."""
        execute, numbers = prepared.execute, itertools.count()

        def failing(*arguments: Any) -> Any:
            if next(numbers) == at:
                raise DBAPIError("", None, Exception("no"))
            return execute(*arguments)

        before, last_sid = copy.deepcopy(self.model), self.last_sid
        self.now += 1
        expected = [self.apply(write) for write in group]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepared, "execute", failing)
            try:
                outcomes = self.store.write(group, now=self.now)
            except StoreError:
                self.model, self.last_sid = before, last_sid
                return
        self.compare(outcomes, expected)


class MemoryMachine(StoreMachine):
    """The same without restarts."""

    is_durable = False


SETTINGS = settings(max_examples=25, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
StoreMachine.TestCase.settings = SETTINGS
FailingMachine.TestCase.settings = SETTINGS
MemoryMachine.TestCase.settings = SETTINGS
TestSqliteMachine = StoreMachine.TestCase
TestFailingMachine = FailingMachine.TestCase
TestMemoryMachine = MemoryMachine.TestCase
