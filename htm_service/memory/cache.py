"""Which sessions are on the device, and which of their chunks have pages there.

    cold --want()--> loading --(keys and tokens from the store, in pieces)--> resident --evict()--> cold

A cold session costs nothing on the device. Of a resident one all summary keys are here, and of its contents what
the budget has room for: storage has everything, so a sealed chunk's page may go at any time and is fetched when an
attend takes the chunk. When there is no room, the pages go first that were used least recently, of whatever session;
when that is not enough, whole sessions do. Sealed chunks that go are kept in host memory, as far as there is room for
them: see `host_tier.py`. What is appended while a session loads waits in `session.pending`.
Unless they say otherwise, methods run on the device thread. Does not know requests or attention, and reads nothing
itself; see `loader.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from htm_service.errors import HTMError, OutOfMemory, Unhealthy
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import NO_PAGE, Memory
from htm_service.memory.host_tier import HostTier
from htm_service.reads.visibility import EpisodeRun
from htm_service.records import Ints
from htm_service.session_settings import Shape
from htm_service.sessions.session import NewTokens, Session, joined
from storage.base import Block

DROP_SHARE = 32
"""Where room is needed, one page of so many goes at once: looking for the oldest costs as much for one as for many."""

COPIED_AT_ONCE = 64 << 20
"""Where what is dropped is copied to the host tier, for which attends wait: no more bytes than these, unless needed."""


class Residency:
    """See the head of this module. `load(session)` begins to read a session that became `loading`."""

    def __init__(
        self, device: torch.device, budget_bytes: int, host_budget_bytes: int, load: Callable[[Session], None]
    ) -> None:
        self.budget = Budget(budget_bytes)
        self.host = HostTier(device, host_budget_bytes)
        self.device = device
        self.num_loads = 0
        self.num_evictions = 0
        """Sessions that went cold."""
        self.num_dropped = 0
        """Pages that were dropped."""
        self.num_fetched = 0
        """Pages that came back."""
        self._load = load
        self._now = self._protected_from = 1  # what was never used counts as used at 0
        self._is_in_lot = False
        self._arenas: dict[Shape, Arena] = {}
        self._resident: OrderedDict[Session, None] = OrderedDict()
        self._loading: set[Session] = set()

    @property
    def num_resident(self) -> int:
        """Sessions on the device."""
        return len(self._resident)

    @property
    def key_bytes(self) -> int:
        """Bytes of the summary keys of these, room to grow included. Asked by any thread."""
        return sum(memory.device_key_bytes for one in self.resident() if (memory := one.memory) is not None)

    def resident(self) -> list[Session]:
        """The sessions on the device, the one used least recently first. Asked by any thread."""
        return list(self._resident)

    def begin_batch(self) -> None:
        """The clock of page use goes on by one."""
        self._now += 1
        if not self._is_in_lot:
            self._protected_from = self._now

    @contextlib.contextmanager
    def lot(self) -> Iterator[None]:
        """While pages are put and those who waited for them run, what was put is not dropped again."""
        self.begin_batch()
        self._is_in_lot = True
        try:
            yield
        finally:
            self._is_in_lot = False

    def touch(self, memory: Memory, chunks: Ints | Sequence[int]) -> None:
        """Count chunks as used now."""
        memory.touch(np.asarray(chunks), self._now)

    def admit(self, session: Session) -> None:
        """Make an empty session resident: there is nothing to load. It stays cold when there is no room."""
        with contextlib.suppress(OutOfMemory):
            session.memory = self.new_memory(session)
            session.state = "resident"
            self._resident[session] = None

    def want(self, session: Session) -> bool:
        """Whether the session is resident, with all its tokens; when it is cold, its loading begins.

        Raises OutOfMemory, changing nothing.
        """
        if session.state == "resident":
            self._resident.move_to_end(session)
            if session.pending:
                self._settle(session)
        if session.state == "resident":
            return True
        if session.state == "cold":
            session.memory = self.new_memory(session)
            session.state = "loading"
            session.episodes = []
            self._loading.add(session)
            self.num_loads += 1
            self._load(session)
        return False

    def append(self, session: Session, new: Block, first_position: int) -> None:
        """Make durable tokens visible; the session begins at `first_position` then. A cold one only learns of that.

        A few tokens wait beside their chunk, as bytes, until a reader wants the session or the chunk is full: to add
        many at once costs little more than to add one.
        """
        session.length = new.start + new.num_tokens
        has_evicted = first_position > session.first_position
        if has_evicted:
            first_chunk, session.first_position = session.first_chunk, first_position
            self.host.let_go(session, range(first_chunk, session.first_chunk))
        memory = session.memory
        if memory is None:
            return
        if session.state != "resident":
            session.pending.append(new)
            return
        if new.start >= memory.length:  # else it was read with the load, before it was handed over here
            session.pending.append(new)
        if has_evicted or session.length // memory.chunk_size > memory.num_sealed:
            self._settle(session)
        if has_evicted:
            self._let_go(session, first_position)

    def _let_go(self, session: Session, first_position: int) -> None:
        """Forget what was evicted."""
        if session.memory is not None:
            session.memory.let_go(first_position // session.settings.chunk_size)
        runs = session.episodes
        while len(runs) > 1 and runs[1].start <= first_position:
            del runs[0]

    def evict(self, session: Session) -> None:
        """Give back everything the session has on the device."""
        self._resident.pop(session, None)
        self._loading.discard(session)
        if session.memory is not None:
            session.memory.release()
        session.memory = None
        session.state = "cold"
        session.pending = []
        session.num_stored_keys = 0

    # --- what the loader brings ---

    def add_keys(self, session: Session, first: int, keys: torch.Tensor) -> None:
        """The sealed chunks from `first` on of a loading session, by their keys [m, D]. Raises OutOfMemory."""
        memory = session.memory
        if memory is None:  # deleted while it was loading
            return
        if first > memory.num_chunks:  # those between were evicted while it was loading
            memory.restart(first)
        keys = keys[memory.num_chunks - first :]
        if memory.num_chunks == memory.first_chunk:  # room for all at once, rather than by and by
            num_chunks = max(len(keys), session.num_chunks - memory.first_chunk)
            self._make_room(memory, 0, memory.num_key_bytes_for(num_chunks), session)
            memory.reserve(num_chunks)
        memory.append_keys(keys)
        session.num_stored_keys = memory.num_chunks

    def add(self, session: Session, new: NewTokens) -> None:
        """The next tokens of a loading session, or of a resident one. Raises OutOfMemory, Unhealthy."""
        memory = session.memory
        if memory is None:  # deleted while it was loading
            return
        if session.settings.evicts:
            new = _after_evictions(memory, new)
        if new.start != memory.length:
            raise Unhealthy(f"session {session.id!r}: tokens from {new.start} on do not follow {memory.length}")
        num_tokens, at_once = new.tokens.shape[0], self._tokens_at_once(memory)
        for first in range(0, num_tokens, at_once):
            num_pages = memory.num_pages_for(min(at_once, num_tokens - first))
            self._make_room(memory, num_pages, memory.num_key_bytes_for(num_pages), session)
            memory.append(new.tokens[first : first + at_once])
        if num_tokens and (not session.episodes or session.episodes[-1].episode != new.episode):
            session.episodes.append(EpisodeRun(new.start, new.episode))

    def end_load(self, session: Session, error: HTMError | None) -> HTMError | None:
        """The loading session is complete, or cannot be; answers what went wrong."""
        if session.memory is None or session.is_deleted:  # deleted while it was loading
            self.evict(session)
        elif error is None:
            try:
                # Those before were in the store's snapshot.
                pending = [new for new in session.pending if new.start >= session.memory.length]
                session.pending = []
                for tokens in joined(pending, session.settings):
                    self.add(session, tokens)
                if session.memory.length < session.length:
                    raise Unhealthy(
                        f"session {session.id!r}: {session.memory.length} of {session.length} tokens are stored"
                    )
                # What was read may be ahead of what was handed over here, by a group or two.
                first = max(session.first_position, session.settings.first_position(session.memory.length))
                if session.memory.first_position > first:
                    raise Unhealthy(f"session {session.id!r}: stored tokens begin at {session.memory.first_position}")
                self._let_go(session, first)
                session.state = "resident"
                self._loading.discard(session)
                self._resident[session] = None
            except HTMError as reason:
                error = reason
        if error is not None:
            self.evict(session)
        return error

    def put(self, session: Session, contents: Mapping[int, torch.Tensor]) -> None:
        """Pages for sealed chunks whose contents [C, D] were fetched. Raises OutOfMemory."""
        memory = session.memory
        if memory is None or session.state != "resident":  # it went cold meanwhile, and loads again when wanted
            return
        chunks = memory.missing(list(contents))
        if not chunks:
            return
        self._make_room(memory, len(chunks), 0, session)
        memory.put(chunks, torch.stack([contents[chunk] for chunk in chunks]))
        self.touch(memory, chunks)
        self.num_fetched += len(chunks)

    # --- room ---

    def max_fetch(self, memory: Memory) -> int:
        """Pages that may be fetched together: half of what there is, the rest being open chunks and keys."""
        return max(1, memory.arena.max_pages // 2)

    def _tokens_at_once(self, memory: Memory) -> int:
        """Tokens added in one step: of a session larger than the budget, the first pages go before the last come."""
        return max(1, memory.arena.max_pages // 4) * memory.chunk_size

    def _make_room(self, memory: Memory, num_pages: int, num_key_bytes: int, keep: Session) -> None:
        """Drop and evict until so much can be taken, never `keep` itself. Raises OutOfMemory."""
        while self.budget.free_bytes < num_key_bytes:
            if not self._empty_slab() and not self._evict_oldest(keep):
                raise OutOfMemory(
                    f"session {keep.id!r} needs {num_key_bytes} bytes for summary keys more on the device, "
                    f"{self.budget.used_bytes} of {self.budget.limit_bytes} bytes are in use"
                )
        if num_key_bytes:  # taken at once, so that pages do not take it
            self.budget.take(num_key_bytes)
        try:
            while (missing := num_pages - memory.arena.num_available) > 0:
                if not self._drop(memory.arena, missing) and not self._evict_oldest(keep):
                    raise OutOfMemory(
                        f"session {keep.id!r} needs {missing} pages of {memory.arena.page_bytes} bytes more on the "
                        f"device, {self.budget.used_bytes} of {self.budget.limit_bytes} bytes are in use"
                    )
        finally:
            if num_key_bytes:
                self.budget.give(num_key_bytes)

    def _drop(self, arena: Arena, num_pages: int) -> int:
        """Drop the pages of an arena that were used least recently; how many went."""
        candidates = [
            (session, memory, chunks[old])
            for session, memory in self._in(arena)
            if len(old := memory.ages(chunks := memory.droppable()) < self._protected_from)
        ]
        ages = np.concatenate([memory.ages(chunks) for _, memory, chunks in candidates] or [np.empty(0, np.int64)])
        share = len(ages) // DROP_SHARE
        if self.host.budget.limit_bytes:
            share = min(share, COPIED_AT_ONCE // arena.page_bytes)
        num_pages = min(len(ages), max(num_pages, share))
        if not num_pages:
            return 0
        newest = np.partition(ages, num_pages - 1)[num_pages - 1]
        rest = num_pages
        for session, memory, chunks in candidates:
            going = chunks[memory.ages(chunks) <= newest][:rest]
            self._give_up(session, memory, going)
            rest -= len(going)
        return num_pages

    def _give_up(self, session: Session, memory: Memory, chunks: npt.NDArray[np.int64]) -> None:
        """Drop the pages of these sealed chunks."""
        self.host.keep(session, chunks)
        memory.drop(chunks.tolist())
        self.num_dropped += len(chunks)

    def _empty_slab(self) -> bool:
        """Give the slab whose pages are the least used back to the budget; whether that could be done.

        Its sealed chunks are dropped, what must stay moves to other slabs.
        """
        found = [(age, arena, slab) for arena in self._arenas.values() for slab, age in self._ages(arena).items()]
        for _, arena, slab in sorted(found, key=lambda entry: entry[0]):
            staying: list[tuple[Memory, int]] = []
            for session, memory in self._in(arena):
                inside = memory.chunks_in(slab)
                is_old = (inside < memory.num_sealed) & (memory.ages(inside) < self._protected_from)
                self._give_up(session, memory, inside[is_old])
                staying.extend((memory, chunk) for chunk in inside[~is_old].tolist())
            missing = len(staying) - arena.num_free_outside(slab)
            if missing <= 0 or self._drop(arena, missing) >= missing:
                for memory, chunk in staying:
                    memory.move(chunk, slab)
                return True
        return False

    def _ages(self, arena: Arena) -> dict[int, float]:
        """Per slab of an arena, when its pages were used on average."""
        memories = [memory for _, memory in self._in(arena)]
        pages = np.concatenate([np.array(memory.pages, np.int64) for memory in memories] or [np.empty(0, np.int64)])
        used_at = np.concatenate([memory.used_at for memory in memories] or [np.empty(0, np.int64)])
        slabs = pages[pages != NO_PAGE] // arena.slab_pages
        sums, counts = np.bincount(slabs, used_at[pages != NO_PAGE]), np.bincount(slabs)
        return {slab: float(sums[slab] / counts[slab]) for slab in np.flatnonzero(counts).tolist()}

    def _evict_oldest(self, keep: Session) -> bool:
        """The session that was used least recently goes cold, if there is another one."""
        victim = next((other for other in self._resident if other is not keep and other.length), None)
        if victim is None:
            return False
        self.num_evictions += 1
        if self.host.budget.limit_bytes and victim.memory is not None:
            chunks = victim.memory.droppable()
            self.host.keep(victim, chunks[np.argsort(victim.memory.ages(chunks), kind="stable")])
        self.evict(victim)
        return True

    def _in(self, arena: Arena) -> list[tuple[Session, Memory]]:
        """The sessions that have pages in an arena, loading ones too."""
        return [(session, memory) for session, memory in self._all() if memory.arena is arena]

    def _all(self) -> Iterator[tuple[Session, Memory]]:
        for session in itertools.chain(self._resident, self._loading):
            if session.memory is not None:
                yield session, session.memory

    def _settle(self, session: Session) -> None:
        """Put what waits into the chunks of a resident session; one that does not fit goes cold."""
        pending, session.pending = session.pending, []
        try:
            for new in joined(pending, session.settings):
                self.add(session, new)
        except OutOfMemory:
            logging.getLogger(__name__).warning("session %s outgrew the device budget and goes cold", session.id)
            self.evict(session)
        except BaseException:
            self.evict(session)  # some of its tokens may be missing here; storage has all
            raise

    def new_memory(self, session: Session) -> Memory:
        """An empty memory of the session's width, chunk size and type. Raises OutOfMemory."""
        shape = session.settings.shape
        arena = self._arenas.get(shape)
        if arena is None:
            # Each reserves address space: those that nobody uses must not pile up, for shapes are the sessions' choice.
            used = {memory.arena for _, memory in self._all()}
            self._arenas = {of: arena for of, arena in self._arenas.items() if arena in used}
            arena = self._arenas[shape] = Arena(*shape, self.device, self.budget)
        return Memory(arena, self.budget, session.first_chunk)


def _after_evictions(memory: Memory, new: NewTokens) -> NewTokens:
    """What of stored tokens is wanted next, in a session whose first ones may have been evicted while it was read.

    The store has no gaps but that one: what does not follow begins later because everything before it is gone.
    """
    if new.start > memory.length:
        memory.restart(-(-new.start // memory.chunk_size))
    skip = min(memory.length - new.start, len(new.tokens))
    return NewTokens(new.start + skip, new.tokens[skip:], new.episode) if skip else new
