"""A session as a file, piece by piece: a first pass over the store for the checksums, a second one that is sent.

No view of the database is held while a reader is waited for: tokens that were appended do not change, so each piece is
read by itself, up to the length at the start. What is trimmed, cut off or deleted meanwhile ends the export: a first
pass is refused, a second breaks off before its end. Memory: a few pieces, whatever the session has; 16 bytes for each
token are kept aside in a temporary file. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import IO

import numpy as np

from htm_service.errors import LengthConflict, Overloaded
from htm_service.sessions.directory import Directory
from htm_service.sessions.session import Session
from htm_service.store_errors import still_there, unreadable
from htm_service.transfers.session_file import MINUS_ONE, NO_EPISODE, Layout, header, layout_of
from storage.base import NO_LIMIT, Store, StoreError, TooManyBytes

PIECE_BYTES = 2 << 20
"""Read and sent at once."""
PAYLOADS_AT_ONCE = 4_096
MAX_EXPORTS = 16
"""At one time."""
SPOOL_BYTES = 1 << 20
"""What a temporary file holds in memory before it is one."""


@dataclass(slots=True)
class _Pass:
    """One reading of a session: checksums as far as it has come, and what is kept aside, in the first one."""

    embeddings: hashlib._Hash
    payloads: hashlib._Hash
    episodes: IO[bytes] | None = None
    offsets: IO[bytes] | None = None


class Export:
    """One session's file: `num_bytes` of it, in `pieces`. To be closed."""

    def __init__(self, store: Store, directory: Directory, session: Session) -> None:
        self._store = store
        self._directory = directory
        self._session = session
        self._first, self._stop, _ = session.resident.extent
        self._token_bytes = session.resident.token_bytes
        self._episodes = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - closed by `close`
        self._offsets = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115
        self._checksums: dict[str, str] = {}
        self._head = b""
        self.num_bytes = 0
        self.is_closed = False

    async def survey(self) -> None:
        """The first pass: what the header says. Raises SessionNotFound, LengthConflict, SessionDamaged, Unhealthy."""
        found = _Pass(hashlib.sha256(), hashlib.sha256(), self._episodes, self._offsets)
        episodes, offsets = hashlib.sha256(), hashlib.sha256()
        async for _ in self._tokens(found):
            pass
        self._offsets.write(bytes(8))
        num_payload_bytes = 0
        async for piece in self._payloads(found):
            num_payload_bytes += len(piece)
        for file, digest in ((self._episodes, episodes), (self._offsets, offsets)):
            async for piece in _read(file):
                digest.update(piece)
        self._checksums = {
            "episodes": episodes.hexdigest(),
            "payload_offsets": offsets.hexdigest(),
            "embeddings": found.embeddings.hexdigest(),
            "payloads": found.payloads.hexdigest(),
        }
        layout = self._layout(num_payload_bytes)
        self._head = header(layout, self._checksums)
        self.num_bytes = len(self._head) + layout.num_data_bytes

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The file. Raises as `survey` does, before the last piece, where it is not what the header says."""
        yield self._head
        for file in (self._episodes, self._offsets):
            async for piece in _read(file):
                yield piece
        found = _Pass(hashlib.sha256(), hashlib.sha256())
        for name, digest, rest in (
            ("embeddings", found.embeddings, self._tokens(found)),
            ("payloads", found.payloads, self._payloads(found)),
        ):
            held = b""
            async with aclosing(rest):
                async for piece in rest:
                    if held:
                        yield held
                    held = piece
            if digest.hexdigest() != self._checksums[name]:
                raise self._changed()
            yield held

    def close(self) -> None:
        """Give back what is kept aside. Safe to call twice."""
        self._episodes.close()
        self._offsets.close()
        self.is_closed = True

    def _layout(self, num_payload_bytes: int) -> Layout:
        return layout_of(self._session.settings, self._first, self._stop, num_payload_bytes)

    async def _tokens(self, found: _Pass) -> AsyncGenerator[bytes, None]:
        """The embeddings as they are stored."""
        num_each = max(1, PIECE_BYTES // self._token_bytes)
        for start in range(self._first, self._stop, num_each):
            self._directory.known(self._session.key)  # it is in use: it does not expire meanwhile
            yield await asyncio.to_thread(self._read_tokens, start, min(start + num_each, self._stop), found)

    async def _payloads(self, found: _Pass) -> AsyncGenerator[bytes, None]:
        """The texts of the payloads, one after the other, of tokens that have some."""
        start, num_bytes = self._first, 0
        while start < self._stop:
            self._directory.known(self._session.key)  # it is in use: it does not expire meanwhile
            piece, start = await asyncio.to_thread(self._read_payloads, start, num_bytes, found)
            num_bytes += len(piece)
            if piece:
                yield piece

    def _read_tokens(self, start: int, stop: int, found: _Pass) -> bytes:
        """Tokens start .. stop-1 (a worker thread)."""
        parts, end = [], start
        episodes = np.empty(stop - start, "<i8")
        try:
            for block in self._store.read_blocks(self._session.sid, start, stop):
                low, high = max(start, block.start), min(stop, block.start + block.num_tokens)
                if low != end:
                    break
                parts.append(memoryview(block.data)[(low - block.start) * self._token_bytes :])
                parts[-1] = parts[-1][: (high - low) * self._token_bytes]
                episodes[low - start : high - start] = _number_of(block.episode)
                end = high
            if end < stop:
                self._check_unchanged()
                raise StoreError(f"the tokens {end} to {stop} cannot be read")
        except StoreError as error:
            raise unreadable(self._session.id, error) from error
        piece = b"".join(parts)
        found.embeddings.update(piece)
        if found.episodes is not None:
            found.episodes.write(episodes.tobytes())
        return piece

    def _read_payloads(self, start: int, num_before: int, found: _Pass) -> tuple[bytes, int]:
        """Some payloads from position `start` on, and where the next ones begin (a worker thread)."""
        num = min(PAYLOADS_AT_ONCE, self._stop - start)
        try:
            while True:
                room = PIECE_BYTES if num > 1 else NO_LIMIT
                try:
                    texts = self._store.read_payload_range(self._session.sid, start, start + num, room)
                    break
                except TooManyBytes:
                    num //= 2
            if not texts:  # maybe because they are gone
                self._check_unchanged()
        except StoreError as error:
            raise unreadable(self._session.id, error) from error
        sizes = [len(texts.get(position, b"")) for position in range(start, start + num)]
        piece = b"".join(texts[position] for position in sorted(texts))
        found.payloads.update(piece)
        if found.offsets is not None:
            found.offsets.write((num_before + np.cumsum(sizes)).astype("<i8").tobytes())
        return piece, start + num

    def _check_unchanged(self) -> None:
        """Raise SessionNotFound, or LengthConflict, where the session is not what it was; and StoreError."""
        row = still_there(self._store, self._session.key, self._session.sid)
        if row.first_position > self._first or row.length < self._stop:
            raise self._changed()

    def _changed(self) -> LengthConflict:
        return LengthConflict(
            f"session {self._session.id!r} was trimmed or cut off while it was exported: export it again"
        )


class Exports:
    """The exports that are on their way."""

    def __init__(self, store: Store, directory: Directory) -> None:
        self._store = store
        self._directory = directory
        self._open: list[Export] = []

    async def begin(self, session: Session) -> Export:
        """The file of a session as it is now, to be closed. Raises Overloaded, and as `Export.survey`."""
        self._open = [export for export in self._open if not export.is_closed]
        if len(self._open) >= MAX_EXPORTS:
            raise Overloaded(f"{len(self._open)} sessions are being exported, which is the limit")
        export = Export(self._store, self._directory, session)
        self._open.append(export)
        try:
            await export.survey()
        except BaseException:
            export.close()
            raise
        return export


async def _read(file: IO[bytes]) -> AsyncIterator[bytes]:
    """What was kept aside, from its beginning."""
    file.seek(0)
    while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
        yield piece


def _number_of(episode: int | None) -> int:
    return NO_EPISODE if episode is None else MINUS_ONE if episode == NO_EPISODE else episode
