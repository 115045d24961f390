"""A session from its file, as its bytes come: checked and written portion by portion, and there only when all is right.

    take a portion -> check it -> write it under a staged name (while the next one comes) -> ... -> publish

What fails, by the file or by whoever sends it, is deleted, and so is what a process left that ended meanwhile. Memory:
a few portions, whatever the file has; 16 bytes for each token are kept aside in a temporary file. Runs on the event
loop. Does not know HTTP or SQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import tempfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson

from htm_service.attention.catalog import Catalog
from htm_service.attention.registry import RETRIEVAL
from htm_service.errors import HTMError, InvalidArgument, Overloaded, QuotaExceeded, Unhealthy
from htm_service.records import DType
from htm_service.session_settings import SessionSettings
from htm_service.sessions import validation
from htm_service.sessions.directory import Directory
from htm_service.sessions.session import Session
from htm_service.transfers.session_file import MAX_HEADER_BYTES, MINUS_ONE, NO_EPISODE, Layout, parse_header
from htm_service.writes.committer import Committer
from storage.base import (
    STAGED,
    AddPayloads,
    Append,
    CreateSession,
    DeleteSession,
    Refused,
    SessionKey,
    SessionRow,
    Store,
    StoreError,
    Write,
)

PORTION_BYTES = 4 << 20
"""Checked and written together, so that appends wait for no more than that."""
PAYLOADS_AT_ONCE = 4_096
WRITES_AT_ONCE = 256
"""Of the appends of one portion: there is one for each run of tokens of one episode."""
MAX_IMPORTS = 16
"""At one time."""
SPOOL_BYTES = 1 << 20
DISCARD_S = 15.0
"""How often what imports have left is looked for."""
MAX_NUMBER = 2**53

Numbers = npt.NDArray[np.int64]
_FINITE: dict[DType, tuple[str, int]] = {
    "float32": ("<u4", 0x7F80_0000),
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
}
"""As what numpy reads an element at rest, and the bits of its exponent: in no finite number all of them are set."""


class Incoming:
    """The bytes of a stream, in the amounts that are asked for."""

    def __init__(self, parts: AsyncIterator[bytes]) -> None:
        self._parts = parts
        self._waiting = bytearray()
        self.num_taken = 0

    async def take(self, num_bytes: int) -> bytes:
        """The next ones, exactly so many. Raises InvalidArgument where the stream ends before."""
        while len(self._waiting) < num_bytes:
            part = await anext(self._parts, None)
            if part is None:
                there = self.num_taken + len(self._waiting)
                raise InvalidArgument(f"the file ends after {there} bytes, in the middle: it is cut off")
            self._waiting += part
        taken = bytes(memoryview(self._waiting)[:num_bytes])
        del self._waiting[:num_bytes]
        self.num_taken += num_bytes
        return taken

    async def end(self) -> None:
        """Raise InvalidArgument where something follows."""
        while not self._waiting:
            part = await anext(self._parts, None)
            if part is None:
                return
            self._waiting += part
        raise InvalidArgument(f"the file goes on after its {self.num_taken} bytes")


@dataclass(slots=True)
class _Staged:
    """A session that is being written."""

    layout: Layout
    settings: SessionSettings
    checksums: dict[str, str]
    sid: int
    episodes: IO[bytes]
    offsets: IO[bytes]


class Imports:
    """See the head of this module. `max_payload_bytes` is what one payload may have, so that it can be read back."""

    def __init__(
        self,
        store: Store,
        committer: Committer,
        directory: Directory,
        models: Catalog,
        clock: Callable[[], float],
        max_payload_bytes: int,
    ) -> None:
        self._store = store
        self._committer = committer
        self._directory = directory
        self._models = models
        self._clock = clock
        self._max_payload_bytes = max_payload_bytes
        self._under_way: set[str] = set()
        """Staged names."""

    async def receive(self, key: SessionKey, parts: AsyncIterator[bytes], num_bytes: int | None) -> Session:
        """The new session; `num_bytes` is what the stream says it has, if it does.

        Raises InvalidArgument, SessionConflict, ModelNotFound, QuotaExceeded, Overloaded, and what `parts` raises; then
        nothing is left of it.
        """
        await self._directory.check_free(key)
        if len(self._under_way) >= MAX_IMPORTS:
            raise Overloaded(f"{len(self._under_way)} sessions are being imported, which is the limit")
        name = uuid.uuid4().hex
        self._under_way.add(name)
        try:
            source = Incoming(parts)
            layout, checksums = await _header(source, num_bytes)
            settings = await self._settings(key, layout)
            await self._check_room(key, layout)
            sid = await self._stage(name, settings, layout)
            try:
                with (
                    tempfile.SpooledTemporaryFile(SPOOL_BYTES) as episodes,
                    tempfile.SpooledTemporaryFile(SPOOL_BYTES) as offsets,
                ):
                    await self._fill(source, _Staged(layout, settings, checksums, sid, episodes, offsets))
            except BaseException:
                await asyncio.shield(self._discard(sid))
                raise
            return await asyncio.shield(self._publish(key, sid, settings))  # half of it would be neither
        finally:
            self._under_way.discard(name)

    async def run(self) -> None:
        """Delete what imports have left, those of processes that ended too, for ever."""
        while True:
            try:
                await self.discard_left()
            except HTMError as error:
                logging.getLogger(__name__).warning("what imports left is deleted later: %s", error)
            except Exception:
                logging.getLogger(__name__).exception("what imports left is deleted later")
            await asyncio.sleep(DISCARD_S)

    async def discard_left(self) -> None:
        """Delete staged sessions that nobody is writing."""
        after: SessionKey | None = SessionKey(STAGED, "")
        while after is not None:
            try:
                rows = await asyncio.to_thread(self._store.list_sessions, STAGED, after=after)
            except StoreError as error:
                raise Unhealthy(f"staged sessions cannot be listed: {error}") from error
            for row in rows:
                if row.id not in self._under_way:
                    await self._discard(row.sid)
            after = rows[-1].key if rows else None

    # --- before the first token ---

    async def _settings(self, key: SessionKey, layout: Layout) -> SessionSettings:
        """What the session is to be, as if it were created here."""
        wish = layout.wish
        name = wish.model or RETRIEVAL
        model = await self._models.get(key.namespace, name)
        settings = validation.resolve_settings(wish, name, model, layout.dtype)
        if layout.first_position % settings.chunk_size:
            raise InvalidArgument(
                f"first_position is {layout.first_position}, no beginning of a chunk of {settings.chunk_size}"
            )
        if settings.max_tokens is not None and layout.num_tokens > settings.max_tokens:
            raise InvalidArgument(f"the file has {layout.num_tokens} tokens, its max_tokens is {settings.max_tokens}")
        return settings

    async def _check_room(self, key: SessionKey, layout: Layout) -> None:
        """Raise QuotaExceeded before anything is written; publishing compares once more."""
        try:
            quota = await asyncio.to_thread(self._store.get_quota, key.namespace)
            held = await asyncio.to_thread(self._store.totals, key.namespace)
        except StoreError as error:
            raise Unhealthy(f"what the namespace holds cannot be read: {error}") from error
        more = layout.num_tokens, layout.num_tokens * layout.token_bytes
        if (
            refused := quota.check(held.num_sessions + 1, held.num_tokens + more[0], held.num_bytes + more[1])
        ) is not None:
            raise QuotaExceeded(str(refused))

    async def _stage(self, name: str, settings: SessionSettings, layout: Layout) -> int:
        row = SessionRow(name, settings.stored(), self._clock(), first_position=layout.first_position, namespace=STAGED)
        staged = await self._committer.write(CreateSession(row), None)
        assert isinstance(staged, SessionRow)
        return staged.sid

    # --- the tensors, in their order ---

    async def _fill(self, source: Incoming, staged: _Staged) -> None:
        """Take all that follows the header, and write it. Raises InvalidArgument."""
        layout = staged.layout
        places = layout.places
        most = layout.num_payload_bytes
        offsets = _Offsets(most, self._max_payload_bytes)
        for name, file, check in (
            ("episodes", staged.episodes, _check_episodes),
            ("payload_offsets", staged.offsets, offsets.check),
        ):
            digest = hashlib.sha256()
            async for data in _portions(source, places[name].num_bytes):
                await asyncio.to_thread(_keep, data, file, digest, check)
            _compare(staged, name, digest)
        offsets.end()
        for name, writes in (
            ("embeddings", self._tokens(source, staged)),
            ("payloads", self._payloads(source, staged)),
        ):
            digest = hashlib.sha256()
            async with contextlib.aclosing(writes), _Pipe(self._write_all) as pipe:
                async for data, prepare in writes:
                    await pipe.put(await asyncio.to_thread(_prepared, data, digest, prepare))
            _compare(staged, name, digest)
        await source.end()

    async def _tokens(self, source: Incoming, staged: _Staged) -> AsyncGenerator[tuple[bytes, Prepare], None]:
        """The embeddings, and how each portion of them becomes writes."""
        layout = staged.layout
        num_each = max(1, PORTION_BYTES // layout.token_bytes)
        staged.episodes.seek(0)
        for start in range(layout.first_position, layout.length, num_each):
            num = min(num_each, layout.length - start)
            data = await source.take(num * layout.token_bytes)

            def prepare(data: bytes = data, start: int = start, num: int = num) -> list[Write]:
                _check_finite(data, layout, start)
                episodes = np.frombuffer(staged.episodes.read(8 * num), "<i8")
                return list(_appends(staged.sid, data, start, episodes, layout.token_bytes))

            yield data, prepare

    async def _payloads(self, source: Incoming, staged: _Staged) -> AsyncGenerator[tuple[bytes, Prepare], None]:
        """The payloads, and how each portion of them becomes writes."""
        layout, start = staged.layout, staged.layout.first_position
        while start < layout.length:
            offsets = await asyncio.to_thread(_read_offsets, staged.offsets, start - layout.first_position)
            # At least one, and then as many as have no more bytes than a portion.
            num = max(1, int(np.searchsorted(offsets, offsets[0] + PORTION_BYTES, "right")) - 1)
            num = min(num, len(offsets) - 1)
            bounds = (offsets[: num + 1] - offsets[0]).tolist()
            data = await source.take(bounds[-1])

            def prepare(data: bytes = data, start: int = start, bounds: Sequence[int] = bounds) -> list[Write]:
                texts = [_payload(data[low:high], start + at) for at, (low, high) in enumerate(_pairs(bounds))]
                return [AddPayloads(staged.sid, start, texts)] if data else []

            yield data, prepare
            start += num

    async def _write_all(self, writes: Sequence[Write]) -> None:
        """Write a portion; its writes share groups with those of others."""
        for place in range(0, len(writes), WRITES_AT_ONCE):
            some = writes[place : place + WRITES_AT_ONCE]
            results = await asyncio.gather(
                *(self._committer.write(write, None) for write in some), return_exceptions=True
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result

    # --- the end, one way or the other ---

    async def _publish(self, key: SessionKey, sid: int, settings: SessionSettings) -> Session:
        try:
            async with self._models.named(key.namespace, settings.model) as model:
                validation.check_model_dim(settings.model, model, settings.dim)  # it may be another one by now
                return await self._directory.publish(key, sid, settings)
        except HTMError:
            await self._discard(sid)
            raise

    async def _discard(self, sid: int) -> None:
        """Delete a staged session; its bytes are purged with those of others. What cannot be now is tried again."""
        with contextlib.suppress(Refused, HTMError):
            await self._committer.write(DeleteSession(sid), None)


Prepare = Callable[[], list[Write]]


class _Pipe:
    """Writes one portion while the next one comes."""

    def __init__(self, write: Callable[[Sequence[Write]], Any]) -> None:
        self._write = write
        self._writing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Pipe:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        if kind is None:
            await writing
        else:  # what is under way ends before what was written is deleted
            await asyncio.shield(asyncio.wait([writing]))
            writing.cancelled() or writing.exception()

    async def put(self, writes: Sequence[Write]) -> None:
        """Begin to write these, once those before are written. Raises what became of those."""
        if self._writing is not None:
            await self._writing
        self._writing = asyncio.create_task(self._write(writes))


class _Offsets:
    """Where payloads begin and end: from 0 on, never back, up to the last byte."""

    def __init__(self, num_bytes: int, max_payload_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._max_payload_bytes = max_payload_bytes
        self._last: int | None = None

    def check(self, offsets: Numbers) -> None:
        """The next ones."""
        if self._last is None and offsets[0] != 0:
            raise InvalidArgument(f"payload_offsets begin with {offsets[0]}, they must begin with 0")
        sizes = np.diff(offsets, prepend=0 if self._last is None else self._last)
        if sizes.min() < 0 or offsets[-1] > self._num_bytes:
            raise InvalidArgument(f"payload_offsets must grow, up to {self._num_bytes}, the bytes of payloads")
        if sizes.max() > self._max_payload_bytes:
            limit = self._max_payload_bytes
            raise InvalidArgument(f"a payload has {sizes.max()} bytes, the limit is {limit}: no answer could hold it")
        self._last = int(offsets[-1])

    def end(self) -> None:
        """There are no more."""
        if self._last != self._num_bytes:
            raise InvalidArgument(
                f"payload_offsets end with {self._last}, there are {self._num_bytes} bytes of payloads"
            )


async def _header(source: Incoming, num_bytes: int | None) -> tuple[Layout, dict[str, str]]:
    """What the file says of itself. Raises InvalidArgument, also where it has not the bytes that it was to have."""
    size = int.from_bytes(await source.take(8), "little")
    if size > MAX_HEADER_BYTES:
        raise InvalidArgument(f"the file is no session's: its header has {size} bytes, the limit is {MAX_HEADER_BYTES}")
    layout, checksums = parse_header(await source.take(size))
    whole = 8 + size + layout.num_data_bytes
    if num_bytes is not None and num_bytes != whole:
        raise InvalidArgument(f"the body has {num_bytes} bytes, the file {whole}: it is cut off, or goes on")
    return layout, checksums


async def _portions(source: Incoming, num_bytes: int) -> AsyncIterator[bytes]:
    while num_bytes > 0:
        data = await source.take(min(num_bytes, PORTION_BYTES))
        num_bytes -= len(data)
        yield data


# --- in a worker thread ---------------------------------------------------------------------------


def _keep(data: bytes, file: IO[bytes], digest: hashlib._Hash, check: Callable[[Numbers], None]) -> None:
    digest.update(data)
    check(np.frombuffer(data, "<i8"))
    file.write(data)


def _prepared(data: bytes, digest: hashlib._Hash, prepare: Prepare) -> list[Write]:
    digest.update(data)
    return prepare()


def _check_episodes(episodes: Numbers) -> None:
    wrong = (np.abs(episodes) > MAX_NUMBER) & (episodes != MINUS_ONE)
    if wrong.any():
        raise InvalidArgument(f"an episode is {episodes[wrong][0]}, it must be {-MAX_NUMBER} to {MAX_NUMBER}")


def _check_finite(data: bytes, layout: Layout, start: int) -> None:
    kind, exponent = _FINITE[layout.dtype]
    wrong = np.bitwise_and(np.frombuffer(data, kind), exponent) == exponent
    if wrong.any():
        position = start + int(wrong.argmax()) // int(layout.settings["dim"])
        raise InvalidArgument(f"the embedding at position {position} holds NaN or infinity; all must be finite")


def _appends(sid: int, data: bytes, start: int, episodes: Numbers, token_bytes: int) -> Iterator[Append]:
    """One for each run of tokens of one episode."""
    bounds = [0, *(np.flatnonzero(np.diff(episodes)) + 1).tolist(), len(episodes)]
    for low, high in _pairs(bounds):
        number = int(episodes[low])
        episode = None if number == NO_EPISODE else -1 if number == MINUS_ONE else number
        some = data[low * token_bytes : high * token_bytes]
        yield Append(sid, high - low, some, None, episode, if_length=start + low)


def _read_offsets(file: IO[bytes], place: int) -> Numbers:
    file.seek(8 * place)
    return np.frombuffer(file.read(8 * (PAYLOADS_AT_ONCE + 1)), "<i8")


def _payload(text: bytes, position: int) -> bytes | None:
    """A payload as an append would have kept it; None for none."""
    if not text:
        return None
    try:
        value = orjson.loads(text)
        if not isinstance(value, dict):
            raise InvalidArgument(f"the payload at position {position} is no JSON object")
        return orjson.dumps(value)
    except orjson.JSONDecodeError as error:
        raise InvalidArgument(f"the payload at position {position} is not JSON: {error}") from error
    except orjson.JSONEncodeError as error:  # it reads deeper than it writes
        raise InvalidArgument(f"the payload at position {position} is nested too deep") from error


def _pairs(bounds: Sequence[int]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(bounds)


def _compare(staged: _Staged, name: str, digest: hashlib._Hash) -> None:
    if digest.hexdigest() != staged.checksums[name]:
        raise InvalidArgument(f"the tensor {name} does not match its checksum: the file is damaged")
