"""Background order: summary keys of sealed chunks are kept in the store, and their small blocks are joined there; of
sessions that are searched, the sketches too.

A session whose keys are kept is ready as soon as these are read; its contents come by page, when they are taken.
Nothing here is needed for an answer: what was not kept is computed again. Runs on the event loop, so much at a time
that appends wait for no more than that. Does not know SQL or attention.
"""

from __future__ import annotations

import asyncio
import logging
import time

from htm_service.errors import HTMError, OutOfMemory, SessionDamaged
from htm_service.memory.chunks import Chunks
from htm_service.memory.sketches.code import FORMAT, to_bytes
from htm_service.memory.sketches.table import SketchTable
from htm_service.reads.worker import DeviceWorker
from htm_service.sessions.directory import Directory
from htm_service.sessions.session import Session
from htm_service.writes.committer import Committer
from storage.base import Compact, KeepSketches, Refused, Summary, WrongLength

PORTION_BYTES = 4 << 20
"""Contents of the chunks that are compacted by one write."""
PORTION_TOKENS = 4_096
INTERVAL_S = 1.0
REST = 7.0
"""How long it rests after each portion, in times of what that took: the store and the cores are others' meanwhile."""


class Compaction:
    """See the head of this module."""

    def __init__(self, directory: Directory, worker: DeviceWorker, committer: Committer) -> None:
        self._directory = directory
        self._worker = worker
        self._committer = committer

    async def run(self) -> None:
        """Compact whole portions as they come, for ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._compact_all(rest=REST)

    async def finish(self) -> None:
        """Compact what there is, portions that are not whole too."""
        await self._compact_all(at_least=1)

    async def _compact_all(self, at_least: int | None = None, rest: float = 0.0) -> None:
        """Until there is nothing left. Nothing that goes wrong is raised: nobody depends on it."""
        try:
            while await self.compact_once(at_least, rest):
                pass
        except HTMError as error:
            logging.getLogger(__name__).info("compaction goes on later: %s", error)
        except Exception:
            logging.getLogger(__name__).exception("compaction failed and goes on later")

    async def compact_once(self, at_least: int | None = None, rest: float = 0.0) -> int:
        """One portion of each session that has one, with a rest after each; how many."""
        num_compacted = 0
        for session in list(self._directory.sessions()):
            size = _portion_chunks(session)
            least = min(size, at_least or size)
            waiting = session.length // session.settings.chunk_size - _first_without(session)
            if session.resident.state == "resident" and max(waiting, _num_unkept(session)) >= least:
                began = time.monotonic()
                try:
                    async with self._directory.lock(session.key):  # no truncation comes between
                        if waiting >= least:
                            num_compacted += await self._compact(session, min(size, waiting))
                        if _num_unkept(session) >= least:
                            num_compacted += await self._keep_sketches(session, least, size)
                except (SessionDamaged, OutOfMemory) as error:  # its own trouble: the others' turn is now
                    logging.getLogger(__name__).info("session %s is compacted later: %s", session.key, error)
                await asyncio.sleep(rest * (time.monotonic() - began))
        return num_compacted

    async def _compact(self, session: Session, num_chunks: int) -> bool:
        """The next chunks of a session; whether there is a next time for it."""
        first = _first_without(session)

        def copy_keys(chunks: Chunks) -> bytes | None:
            if not chunks.first_chunk <= first <= chunks.num_sealed - num_chunks:
                return None  # trimmed meanwhile
            return chunks.tables(first, first + num_chunks)[0].cpu().numpy().tobytes()

        keys = await self._worker.ask(session.resident, copy_keys)
        if keys is None:
            return False
        write = Compact(session.sid, Summary(first, num_chunks, keys), session.settings.chunk_size)
        try:
            await self._committer.write(write, session.resident)
        except WrongLength as error:
            session.num_stored_keys = error.length
        except Refused:  # deleted
            return False
        else:
            session.num_stored_keys = first + num_chunks
        return True

    async def _keep_sketches(self, session: Session, least: int, most: int) -> bool:
        """Sketches of some chunks, at least and at most so many; whether there were such."""

        def copy(chunks: Chunks) -> tuple[SketchTable, Summary] | None:
            table = chunks.sketches
            if table is None or (some := table.unkept(least, most)) is None:
                return None
            return table, Summary(some[0], some[1] - some[0], to_bytes(*table.tables(*some)))

        copied = await self._worker.ask(session.resident, copy)
        if copied is None:
            return False
        table, sketches = copied
        try:
            write = KeepSketches(session.sid, sketches, session.settings.chunk_size, FORMAT)
            await self._committer.write(write, session.resident)
        except Refused:  # deleted
            return False
        self._worker.have_kept(table, sketches.first, sketches.first + sketches.num_chunks)
        return True


def _first_without(session: Session) -> int:
    """The first chunk whose key the store does not have."""
    return max(session.num_stored_keys, session.first_chunk)


def _num_unkept(session: Session) -> int:
    """Chunks whose sketches are on the device and the store does not have."""
    chunks = session.resident.chunks
    table = None if chunks is None else chunks.sketches
    return 0 if table is None else table.num_unkept


def _portion_chunks(session: Session) -> int:
    """Chunks of a session that are compacted by one write."""
    chunk_bytes = session.settings.chunk_size * session.resident.token_bytes
    return max(1, min(PORTION_BYTES // chunk_bytes, PORTION_TOKENS // session.settings.chunk_size))
