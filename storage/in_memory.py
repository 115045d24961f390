"""A store in memory (`memory://`): the contract without durability, for tests and for the in-process client."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

from storage.base import (
    FIRST_KEY,
    IDEMPOTENCY_SECONDS,
    NO_LIMIT,
    STAGED,
    AddPayloads,
    Append,
    Appended,
    Block,
    CheckSettings,
    Compact,
    CreateKey,
    CreateSession,
    Damage,
    DeleteKey,
    DeleteModel,
    DeleteSession,
    Fork,
    KeepSketches,
    KeyExists,
    KeyReused,
    KeyRow,
    KeyWrite,
    ModelInUse,
    ModelRow,
    ModelWrite,
    NoSuchKey,
    NoSuchModel,
    NoSuchSession,
    Publish,
    PutModel,
    Quota,
    QuotaExceeded,
    Refused,
    SessionExists,
    SessionFull,
    SessionKey,
    SessionRow,
    SetQuota,
    Store,
    Summary,
    Totals,
    Truncate,
    UpdateSession,
    UseKey,
    Write,
    WriteResult,
    WrongLength,
    first_to_keep,
    within,
    wrong_cut,
)


@dataclass(slots=True)
class _Session:
    row: SessionRow
    blocks: list[Block] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)
    sketches: list[tuple[int, Summary]] = field(default_factory=list)
    """With their versions, in order."""
    payloads: dict[int, bytes] = field(default_factory=dict)
    keys: dict[str, tuple[bytes, Appended, float]] = field(default_factory=dict)

    def add_payloads(self, start: int, payloads: Sequence[bytes | None]) -> None:
        """Give tokens from position `start` on their payloads."""
        self.payloads |= {place: body for place, body in enumerate(payloads, start) if body is not None}

    def keep_sketches(self, write: KeepSketches) -> None:
        """Keep sketches, instead of those that are there of these chunks."""
        first, last = write.sketches.first, write.sketches.first + write.sketches.num_chunks
        held = self.row.first_position // write.chunk_size
        new = [(write.version, one) for one in _within([write.sketches], held, None)]
        around = ((of, one) for of, kept in self.sketches for one in _without(kept, first, last))
        self.sketches = sorted([*around, *new], key=lambda entry: entry[1].first)

    def trim(self, first_position: int, chunk_size: int) -> SessionRow:
        """Forget what lies before a position, a chunk's begin; as `trimming.trim`."""
        first = first_position // chunk_size
        blocks, self.blocks = self.blocks, []
        for start, num_tokens, data, episode in blocks:
            if (num_cut := max(0, first_position - start)) < num_tokens:
                rest = data[len(data) // num_tokens * num_cut :]
                self.blocks.append(Block(start + num_cut, num_tokens - num_cut, rest, episode))
        self.summaries = list(_within(self.summaries, first, None))
        self.sketches = [(of, one) for of, kept in self.sketches for one in _within([kept], first, None)]
        self.payloads = {position: body for position, body in self.payloads.items() if position >= first_position}
        num_bytes = sum(len(block.data) for block in self.blocks)
        self.row = replace(self.row, first_position=first_position, num_bytes=num_bytes)
        return self.row

    def until(self, length: int, chunk_size: int) -> _Session:
        """Its tokens before a position, as a session of its own; contents are not copied."""
        last, first = length // chunk_size, min(self.row.first_position, length)
        num_blocks = bisect_left(self.blocks, length, key=lambda block: block.start)
        blocks = self.blocks[:num_blocks]
        blocks[-1:] = [block.within(0, length) for block in blocks[-1:]]
        num_bytes = sum(len(block.data) for block in blocks)
        return _Session(
            replace(self.row, length=length, first_position=first, num_bytes=num_bytes),
            blocks,
            list(_within(self.summaries, 0, last)),
            [(of, one) for of, kept in self.sketches for one in _within([kept], 0, last)],
            {position: body for position, body in self.payloads.items() if position < length},
            {key: kept for key, kept in self.keys.items() if kept[1].length <= length},
        )


class MemoryStore(Store):
    """See the head of this module."""

    url = "memory://"
    durable = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_sid: dict[int, _Session] = {}
        self._sids: dict[SessionKey, int] = {}
        self._last_sid = 0
        self._keys: dict[tuple[str, str], KeyRow] = {}
        self._quotas: dict[str, Quota] = {}
        self._models: dict[tuple[str, str], ModelRow] = {}
        self._model_bytes: dict[int, bytes] = {}
        """By version."""

    def write(self, writes: Sequence[Write], *, now: float) -> list[WriteResult]:
        """See `Store.write`; nothing here can fail half-way."""
        with self._lock:
            return [self._apply(write, now) for write in writes]

    def purge(self, sid: int | None = None) -> bool:
        """A deleted session leaves nothing."""
        return False

    def add_model_part(self, version: int, number: int, data: bytes) -> None:
        """See `Store.add_model_part`."""
        with self._lock:
            self._model_bytes[version] = self._model_bytes.get(version, b"") + data

    def purge_models(self, unfinished: Collection[int] = ()) -> bool:
        """See `Store.purge_models`; all at once."""
        with self._lock:
            kept = {row.version for row in self._models.values()} | set(unfinished)
            self._model_bytes = {version: data for version, data in self._model_bytes.items() if version in kept}
        return False

    def give_back(self) -> bool:
        """Nothing at rest, nothing to give back."""
        return False

    def erase(self) -> bool:
        """Nothing at rest, nothing to erase."""
        return True

    def get_session(self, key: SessionKey) -> SessionRow | None:
        """See `Store.get_session`."""
        with self._lock:
            sid = self._sids.get(key)
            return None if sid is None else self._by_sid[sid].row

    def list_sessions(
        self,
        namespace: str | None = None,
        *,
        prefix: str = "",
        labels: Mapping[str, str] | None = None,
        after: SessionKey = FIRST_KEY,
        limit: int = 100,
    ) -> list[SessionRow]:
        """See `Store.list_sessions`."""
        wanted = (labels or {}).items()
        with self._lock:
            keys = sorted(key for key in self._sids if key > after and key.id.startswith(prefix))
            rows = (self._by_sid[self._sids[key]].row for key in keys if _is_of(key.namespace, namespace))
            return [row for row in rows if wanted <= row.settings.get("labels", {}).items()][:limit]

    def read_blocks(self, sid: int, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """See `Store.read_blocks`."""
        with self._lock:
            session = self._by_sid.get(sid)
            blocks = list(session.blocks) if session is not None else []
        first = max(0, bisect_right(blocks, start, key=lambda block: block.start) - 1)
        for block in islice(blocks, first, None):
            if stop is not None and max(start, block.start) >= stop:
                return
            if block.start + block.num_tokens > start:
                yield block

    def read_ranges(self, ranges: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, Block]]:
        """See `Store.read_ranges`."""
        for place, (sid, start, stop) in enumerate(ranges):
            for block in self.read_blocks(sid, start, stop):
                yield place, block

    def read_episodes(self, sid: int, stop: int) -> list[tuple[int, int | None]]:
        """See `Store.read_episodes`."""
        found = [(block.start, block.episode) for block in self.read_blocks(sid, 0, stop)]
        return [*found[:1], *(run for before, run in pairwise(found) if before[1] != run[1])]

    def read_summaries(self, sid: int) -> Iterator[Summary]:
        """See `Store.read_summaries`."""
        with self._lock:
            session = self._by_sid.get(sid)
            return iter([] if session is None else list(session.summaries))

    def read_sketches(self, sid: int, version: int) -> Iterator[Summary]:
        """See `Store.read_sketches`."""
        with self._lock:
            session = self._by_sid.get(sid)
            kept = [] if session is None else session.sketches
            return iter([one for of, one in kept if of == version])

    def read_payloads(self, sid: int, positions: Sequence[int], max_bytes: int = NO_LIMIT) -> dict[int, bytes]:
        """See `Store.read_payloads`."""
        return within(max_bytes, self._payloads(sid, positions).items())

    def read_payload_range(self, sid: int, start: int, stop: int, max_bytes: int = NO_LIMIT) -> dict[int, bytes]:
        """See `Store.read_payload_range`."""
        return within(max_bytes, self._payloads(sid, range(max(start, 0), stop)).items())

    def list_keys(self) -> list[KeyRow]:
        """See `Store.list_keys`."""
        with self._lock:
            return [self._keys[name] for name in sorted(self._keys)]

    def list_models(self) -> list[ModelRow]:
        """See `Store.list_models`."""
        with self._lock:
            return [self._models[name] for name in sorted(self._models)]

    def read_model(self, row: ModelRow) -> bytes | None:
        """See `Store.read_model`."""
        with self._lock:
            return self._model_bytes.get(row.version)

    def count_sessions(self, namespace: str, model: str | None = None) -> dict[str, int]:
        """See `Store.count_sessions`."""
        with self._lock:
            rows = [one.row for one in self._by_sid.values() if one.row.namespace == namespace]
        names = (row.settings.get("model") for row in rows)
        return dict(Counter(name for name in names if name is not None and model in (None, name)))

    def get_quota(self, namespace: str) -> Quota:
        """See `Store.get_quota`."""
        with self._lock:
            return self._quotas.get(namespace, Quota(namespace))

    def totals(self, namespace: str | None = None) -> Totals:
        """See `Store.totals`."""
        with self._lock:
            rows = [one.row for one in self._by_sid.values() if _is_of(one.row.namespace, namespace)]
            model_bytes = self._held_by_models(namespace)
        num_tokens = sum(row.length - row.first_position for row in rows)
        return Totals(len(rows), num_tokens, sum(row.num_bytes for row in rows), 0, model_bytes)

    def verify(self, check_settings: CheckSettings = lambda settings: None) -> Iterator[Damage]:
        """Nothing at rest, nothing to find."""
        return iter(())

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._by_sid.clear()
            self._sids.clear()
            self._keys.clear()
            self._quotas.clear()
            self._models.clear()
            self._model_bytes.clear()

    def _payloads(self, sid: int, positions: Sequence[int]) -> dict[int, bytes]:
        with self._lock:
            session = self._by_sid.get(sid)
            if session is None:
                return {}
            if isinstance(positions, range):
                positions = range(positions.start, min(positions.stop, session.row.length))
            return {position: session.payloads[position] for position in positions if position in session.payloads}

    def _apply(self, write: Write, now: float) -> WriteResult:
        if isinstance(write, CreateSession):
            return self._create(write.row)
        if isinstance(write, CreateKey | DeleteKey | UseKey):
            return self._apply_to_key(write)
        if isinstance(write, PutModel | DeleteModel):
            return self._apply_to_model(write)
        if isinstance(write, SetQuota):
            self._quotas[write.quota.namespace] = write.quota
            return write.quota
        session = self._by_sid.get(write.sid)
        if session is None:
            return NoSuchSession(f"there is no session of key {write.sid}")
        if isinstance(write, UpdateSession):
            session.row = replace(session.row, settings=dict(write.settings))
        elif isinstance(write, DeleteSession):
            del self._by_sid[write.sid], self._sids[session.row.key]
        elif isinstance(write, Compact):
            ends = (summary.first + summary.num_chunks for summary in session.summaries[-1:])
            end = max(*ends, session.row.first_position // write.chunk_size, 0)
            if write.summary.first != end:
                return WrongLength(end)
            session.summaries.append(write.summary)
        elif isinstance(write, KeepSketches):
            session.keep_sketches(write)
        elif isinstance(write, AddPayloads):
            session.add_payloads(write.start, write.payloads)
        elif isinstance(write, Publish):
            return self._publish(session, write.row)
        elif isinstance(write, Fork):
            return self._fork(session, write)
        elif isinstance(write, Truncate):
            return self._truncate(session, write, now)
        else:
            return self._append(session, write, now)
        return session.row

    def _apply_to_key(self, write: KeyWrite) -> WriteResult:
        if isinstance(write, CreateKey):
            row = write.row
            if (row.namespace, row.name) in self._keys:
                return KeyExists(f"there is a key {row.name!r}")
            self._keys[row.namespace, row.name] = row
            return row
        known = self._keys.get((write.namespace, write.name))
        if known is None:
            return NoSuchKey(f"there is no key {write.name!r}")
        if isinstance(write, DeleteKey):
            return self._keys.pop((write.namespace, write.name))
        used = self._keys[write.namespace, write.name] = replace(known, last_used_at=write.at)
        return used

    def _apply_to_model(self, write: ModelWrite) -> WriteResult:
        named = write.row if isinstance(write, PutModel) else write
        key = named.namespace, named.name
        before = self._models.get(key)
        if isinstance(write, DeleteModel):
            if before is None:
                return NoSuchModel(f"there is no model {write.name!r}")
            if any(self._naming(key, everywhere=write.everywhere)):
                return ModelInUse("sessions name it")
            return self._models.pop(key)
        for settings in self._naming(key, everywhere=write.everywhere):
            for field_, value in write.must_fit.items():
                if (has := settings.get(field_)) != value:
                    return ModelInUse(f"its {field_} would be {value}, and a session that names it has {has}")
        num_more = write.row.num_bytes - (0 if before is None else before.num_bytes)
        if num_more > 0 and (refused := self._beyond_quota(write.row.namespace, num_bytes=num_more)) is not None:
            return refused
        self._models[key] = write.row
        return write.row

    def _naming(self, key: tuple[str, str], *, everywhere: bool) -> Iterator[Mapping[str, Any]]:
        """The settings of the sessions that name a model."""
        namespace, name = key
        own = {other for other, its in self._models if its == name and other != namespace}
        for session in self._by_sid.values():
            row = session.row
            is_here = row.namespace not in own if everywhere else row.namespace == namespace
            if is_here and row.settings.get("model") == name:
                yield row.settings

    def _held_by_models(self, namespace: str | None) -> int:
        return sum(row.num_bytes for row in self._models.values() if namespace in (None, row.namespace))

    def _create(self, row: SessionRow, of: _Session | None = None) -> WriteResult:
        """A new session, with the tokens of another one."""
        held = _Session(replace(row, length=row.first_position, num_bytes=0)) if of is None else of
        length, first, num_bytes = held.row.length, held.row.first_position, held.row.num_bytes
        if row.key in self._sids:
            return SessionExists(f"there is a session {row.id!r}")
        more = {"num_sessions": 1, "num_tokens": length - first, "num_bytes": num_bytes}
        if (refused := self._beyond_quota(row.namespace, **more)) is not None:
            return refused
        self._last_sid += 1
        held.row = replace(
            row,
            sid=self._last_sid,
            length=length,
            first_position=first,
            num_bytes=num_bytes,
            settings=dict(row.settings),
            updated_at=row.updated_at or row.created_at,
        )
        self._by_sid[held.row.sid] = held
        self._sids[row.key] = held.row.sid
        return held.row

    def _fork(self, parent: _Session, write: Fork) -> WriteResult:
        length = parent.row.length if write.length is None else write.length
        if (refused := wrong_cut(parent.row, length)) is not None:
            return refused
        child = parent.until(length, write.chunk_size)
        child.keys = {}
        return self._create(write.row, child)

    def _truncate(self, session: _Session, write: Truncate, now: float) -> WriteResult:
        row = session.row
        if (refused := wrong_cut(row, write.length or row.first_position, write.if_length)) is not None:
            return refused
        kept = session.until(write.length, write.chunk_size)
        kept.row = replace(kept.row, updated_at=now)
        self._by_sid[row.sid] = kept
        return kept.row

    def _publish(self, session: _Session, row: SessionRow) -> WriteResult:
        if row.key in self._sids:
            return SessionExists(f"there is a session {row.id!r}")
        staged = session.row
        held = {"num_tokens": staged.length - staged.first_position, "num_bytes": staged.num_bytes}
        if (refused := self._beyond_quota(row.namespace, num_sessions=1, **held)) is not None:
            return refused
        self._sids[row.key] = self._sids.pop(staged.key)
        session.row = replace(
            staged,
            namespace=row.namespace,
            id=row.id,
            settings=dict(row.settings),
            max_tokens=row.max_tokens,
            created_at=row.created_at,
            updated_at=row.updated_at or row.created_at,
        )
        return session.row

    def _beyond_quota(
        self, namespace: str, *, num_sessions: int = 0, num_tokens: int = 0, num_bytes: int = 0
    ) -> QuotaExceeded | None:
        """Why a namespace may not hold so much more, or None."""
        if (quota := self._quotas.get(namespace)) is None:
            return None
        rows = [one.row for one in self._by_sid.values() if one.row.namespace == namespace]
        held = sum(row.length - row.first_position for row in rows), sum(row.num_bytes for row in rows)
        num_bytes += self._held_by_models(namespace)
        return quota.check(len(rows) + num_sessions, held[0] + num_tokens, held[1] + num_bytes)

    def _append(self, session: _Session, write: Append, now: float) -> Appended | Refused:
        row, key = session.row, write.idempotency_key
        known = session.keys.get(key) if key is not None else None
        if known is not None and known[2] > now - IDEMPOTENCY_SECONDS:
            if known[0] != write.digest:
                return KeyReused(f"idempotency key {key!r} was used with another body")
            return known[1]._replace(replayed=True, first_position=0)
        if write.if_length is not None and write.if_length != row.length:
            return WrongLength(row.length)
        length = row.length + write.num_tokens
        if row.max_tokens is not None and length - row.first_position > row.max_tokens:
            first = first_to_keep(row.length, write.num_tokens, row.max_tokens, write.trim_chunk)
            if first is None or write.trim_chunk is None:
                return SessionFull(row.length, row.max_tokens)
            num_trimmed = first - row.first_position
        else:
            first, num_trimmed = None, 0
        num_bytes = len(write.data) // write.num_tokens * (write.num_tokens - num_trimmed)
        refused = self._beyond_quota(row.namespace, num_tokens=write.num_tokens - num_trimmed, num_bytes=num_bytes)
        if refused is not None:
            return refused
        if first is not None and write.trim_chunk is not None:
            row = session.trim(first, write.trim_chunk)
        session.blocks.append(Block(row.length, write.num_tokens, write.data, write.episode))
        session.add_payloads(row.length, write.payloads or ())
        answer = Appended(row.length, length, first_position=row.first_position)
        session.row = replace(row, length=length, num_bytes=row.num_bytes + len(write.data), updated_at=now)
        if key is not None:
            session.keys = {k: v for k, v in session.keys.items() if v[2] > now - IDEMPOTENCY_SECONDS}
            session.keys[key] = (write.digest, answer, now)
        return answer


def _within(kept: Iterable[Summary], first: int, last: int | None) -> Iterator[Summary]:
    """What there is of the chunks first .. last-1."""
    for one in kept:
        if one.first + one.num_chunks > first and (last is None or one.first < last):
            yield one.within(first, last)


def _without(kept: Summary, first: int, last: int) -> Iterator[Summary]:
    """What there is of other chunks than first .. last-1."""
    yield from _within([kept], 0, first)
    yield from _within([kept], last, None)


def _is_of(namespace: str, wanted: str | None) -> bool:
    """Whether what is of a namespace is of the one that is wanted, or of all but the staged."""
    return namespace == wanted if wanted is not None else namespace != STAGED
