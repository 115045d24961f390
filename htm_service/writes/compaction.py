"""Background order: the summary keys of sealed chunks are kept in the store, their small blocks are joined there.

A session whose keys are kept is ready as soon as these are read; its contents come by page, when they are taken.
Nothing here is needed for an answer: what was not kept is computed again. Runs on the event loop, a lot at a time,
so that appends wait for no more than one. Does not know SQL or attention.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from htm_service.errors import HTMError
from htm_service.memory.chunks import Memory
from htm_service.reads.worker import DeviceWorker, Probe
from htm_service.sessions.session import Session
from htm_service.writes.committer import Change
from storage.base import Refused, Seal, Summary, WrongLength

LOT_BYTES = 4 << 20
"""Contents of the chunks that are sealed by one write."""
LOT_TOKENS = 4_096
INTERVAL_S = 1.0


class Sealer:
    """See the head of this module. `sessions()` are those in use; `submit` makes one write durable."""

    def __init__(
        self,
        worker: DeviceWorker,
        sessions: Callable[[], Iterable[Session]],
        submit: Callable[[Change], Awaitable[object]],
    ) -> None:
        self._worker = worker
        self._sessions = sessions
        self._submit = submit

    async def run(self) -> None:
        """Seal whole lots as they come, for ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self._seal_all()

    async def finish(self) -> None:
        """Seal what there is, lots that are not whole too."""
        await self._seal_all(at_least=1)

    async def _seal_all(self, at_least: int | None = None) -> None:
        """Seal lots until there are none. Nothing that goes wrong is raised: nobody depends on it."""
        try:
            while await self.seal_lots(at_least):
                pass
        except HTMError as error:
            logging.getLogger(__name__).info("sealing goes on later: %s", error)
        except Exception:
            logging.getLogger(__name__).exception("sealing failed and goes on later")

    async def seal_lots(self, at_least: int | None = None) -> int:
        """Seal one lot of each session that has one; how many."""
        num_sealed = 0
        for session in list(self._sessions()):
            size = _lot_chunks(session)
            waiting = session.length // session.settings.chunk_size - _next_to_seal(session)
            if session.state == "resident" and waiting >= min(size, at_least or size):
                num_sealed += await self._seal(session, min(size, waiting))
        return num_sealed

    async def _seal(self, session: Session, num_chunks: int) -> bool:
        """Seal the next chunks of a session; whether there is a next time for it."""
        first, known = _next_to_seal(session), session.num_stored_keys

        def copy_keys(memory: Memory) -> bytes | None:
            if session.num_stored_keys != known or not memory.first_chunk <= first <= memory.num_sealed - num_chunks:
                return None  # it went cold and came back meanwhile, or was evicted
            return memory.tables(first, first + num_chunks)[0].cpu().numpy().tobytes()

        keys = await self._worker.batcher.submit(Probe(session, copy_keys), lane=session.sid)
        if keys is None:
            return False
        seal = Seal(session.sid, Summary(first, num_chunks, keys), session.settings.chunk_size)
        try:
            await self._submit(Change(seal, session))
        except WrongLength as error:
            session.num_stored_keys = error.length
        except Refused:  # deleted
            return False
        else:
            session.num_stored_keys = first + num_chunks
        return True


def _next_to_seal(session: Session) -> int:
    """The first chunk whose key the store does not have."""
    return max(session.num_stored_keys, session.first_chunk)


def _lot_chunks(session: Session) -> int:
    """Chunks of a session that are sealed by one write."""
    settings = session.settings
    chunk_bytes = settings.chunk_size * settings.dim * settings.itemsize
    return max(1, min(LOT_BYTES // chunk_bytes, LOT_TOKENS // settings.chunk_size))
