"""Which sessions are on the device: loading from the store, eviction, appending to what is resident.

    cold --want()--> loading --(read from the store, in pieces)--> resident --evict()--> cold

A cold session costs nothing on the device. Its first reader parks; a loader thread streams its blocks, the
device thread copies them piece by piece between batches, so others go ahead. What is appended meanwhile
waits in `session.pending`. When the budget is exhausted, the session that was used least recently goes cold
whole: storage has everything, so nothing is lost.
All methods but the loader's run on the device thread. Does not know requests or attention.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from htm_service.arena import Arena, Budget
from htm_service.batcher import Batcher
from htm_service.dtypes import TORCH_DTYPES, from_bytes
from htm_service.errors import HTMError, OutOfMemory, Unhealthy
from htm_service.memory import Memory
from htm_service.session import NewTokens, Session
from htm_service.visibility import EpisodeRun
from storage.base import Block, Store, StoreError

PIECE_BYTES = 8 << 20
"""Bytes copied to the device between two batches while a session loads."""


class Residency:
    """See the head of this module.

    `worker` is the device thread; `on_resident(session, error)` is called there when a load has
    ended, with the parked readers still in `session.parked`.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        budget_bytes: int,
        worker: Batcher[Any, Any],
        on_resident: Callable[[Session, HTMError | None], None],
    ) -> None:
        self.budget = Budget(budget_bytes)
        self.num_loads = 0
        self.num_evictions = 0
        self._store = store
        self.device = device
        self._worker = worker
        self._on_resident = on_resident
        self._arenas: dict[tuple[int, int, torch.dtype], Arena] = {}
        self._resident: OrderedDict[Session, None] = OrderedDict()
        # One loader: two sessions that fit only one after the other must not load side by side.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="htm-loader")

    @property
    def num_resident(self) -> int:
        """Sessions on the device."""
        return len(self._resident)

    def admit(self, session: Session) -> None:
        """Make an empty session resident: there is nothing to load."""
        session.memory = self._new_memory(session)
        session.state = "resident"
        self._resident[session] = None

    def want(self, session: Session) -> bool:
        """Whether the session is resident; when it is cold, its loading begins."""
        if session.state == "resident":
            self._resident.move_to_end(session)
            return True
        if session.state == "cold":
            session.state = "loading"
            session.memory = self._new_memory(session)
            session.episodes = []
            self.num_loads += 1
            self._loader.submit(self._load, session)
        return False

    def append(self, session: Session, new: NewTokens) -> None:
        """Make durable tokens visible. A cold session only learns its new length."""
        session.length = new.start + len(new.tokens)
        session.stored_bytes += new.tokens.nbytes
        if session.state == "loading":
            session.pending.append(new)
        elif session.state == "resident":
            try:
                self._add(session, new)
            except OutOfMemory:
                logging.getLogger(__name__).warning("session %s outgrew the device budget and goes cold", session.id)
                self.evict(session)

    def evict(self, session: Session) -> None:
        """Give back everything the session has on the device."""
        self._resident.pop(session, None)
        if session.memory is not None:
            session.memory.release()
        session.memory = None
        session.state = "cold"
        session.pending = []

    def close(self) -> None:
        """Stop loading."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    # --- the loader's thread ---

    def _load(self, session: Session) -> None:
        error: HTMError | None = None
        try:
            added: Callable[[], None] | None = None
            for piece in self._pieces(session):
                if added is not None:
                    added()
                added = self._add_piece(session, piece)  # while the next one is read
            if added is not None:
                added()
        except HTMError as reason:
            error = reason
        except StoreError as reason:
            error = Unhealthy(f"session {session.id!r} cannot be read: {reason}")
        except Exception as reason:
            logging.getLogger(__name__).exception("session %s could not be loaded", session.id)
            error = Unhealthy(f"session {session.id!r} could not be loaded: {reason!r}")
        self._worker.post(lambda: self._end_load(session, error))

    def _pieces(self, session: Session) -> Iterable[list[NewTokens]]:
        """The stored tokens in lots of about PIECE_BYTES, neighbours of one episode together."""
        lot: list[Block] = []
        num_bytes = 0
        for block in self._store.read_blocks(session.sid):
            lot.append(block)
            num_bytes += len(block.data)
            if num_bytes >= PIECE_BYTES:
                yield _merged(lot, session)
                lot, num_bytes = [], 0
        if lot:
            yield _merged(lot, session)

    def _add_piece(self, session: Session, piece: list[NewTokens]) -> Callable[[], None]:
        """Have the device thread add `piece`; the answer waits for that, and raises what went wrong."""
        done = threading.Event()
        errors: list[HTMError] = []

        def add() -> None:
            try:
                if session.memory is not None:
                    for new in piece:
                        self._add(session, new)
            except HTMError as error:
                errors.append(error)
            finally:
                done.set()

        def wait() -> None:
            while not done.wait(0.5):
                if not self._worker.is_running:
                    raise Unhealthy("the device thread has stopped")
            if errors:
                raise errors[0]

        self._worker.post(add)
        return wait

    # --- the device thread again ---

    def _end_load(self, session: Session, error: HTMError | None) -> None:
        if session.memory is None or session.is_deleted:  # deleted while it was loading
            self.evict(session)
        elif error is None:
            try:
                for new in session.pending:
                    if new.start >= session.memory.length:  # the others were in the store's snapshot
                        self._add(session, new)
                session.pending = []
                if session.memory.length != session.length:
                    raise Unhealthy(
                        f"session {session.id!r}: {session.memory.length} of {session.length} tokens are stored"
                    )
                session.state = "resident"
                self._resident[session] = None
            except HTMError as reason:
                error = reason
        if error is not None:
            self.evict(session)
        self._on_resident(session, error)

    def _add(self, session: Session, new: NewTokens) -> None:
        """Append to the session's memory, evicting others as long as that is what it takes."""
        memory = session.memory
        assert memory is not None, "only a resident or loading session takes tokens"
        if new.start != memory.length:
            raise Unhealthy(f"session {session.id!r}: tokens from {new.start} on do not follow {memory.length}")
        while True:
            try:
                memory.append(new.tokens)
                break
            except OutOfMemory:
                victim = next((other for other in self._resident if other is not session and other.length), None)
                if victim is None:
                    raise
                self.num_evictions += 1
                self.evict(victim)
        if not session.episodes or session.episodes[-1].episode != new.episode:
            session.episodes.append(EpisodeRun(new.start, new.episode))

    def _new_memory(self, session: Session) -> Memory:
        settings = session.settings
        key = (settings.dim, settings.chunk_size, TORCH_DTYPES[settings.dtype])
        arena = self._arenas.get(key)
        if arena is None:
            arena = self._arenas[key] = Arena(*key, self.device, self.budget)
        return Memory(arena, self.budget)


def _merged(lot: list[Block], session: Session) -> list[NewTokens]:
    """Neighbours of one episode as one: a session appended token by token loads in few steps."""
    settings = session.settings
    runs = (list(run) for _, run in itertools.groupby(lot, key=lambda block: block.episode))
    return [
        NewTokens(run[0].start, from_bytes([block.data for block in run], settings.dtype, settings.dim), run[0].episode)
        for run in runs
    ]
