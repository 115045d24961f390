"""Which sessions are on the device, and which of their chunks have pages there; their states are `resident.py`'s.

A cold session costs nothing on the device. Of a resident one all summary keys are here, and of its contents what
the budget has room for: a page that went is fetched when an attend takes its chunk. What goes is `reclaim.py`'s.
Unless they say otherwise, methods run on the device thread. Does not know requests or attention, and reads nothing
itself; see `loader.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from htm_service.errors import HTMError, OutOfMemory, Unhealthy
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import NO_PAGE, Chunks
from htm_service.memory.reclaim import Reclaim
from htm_service.memory.resident import EpisodeRun, Extent, NewTokens, Resident, joined
from htm_service.memory.sketches.code import LEAST_DIM, from_bytes, sketch
from htm_service.memory.sketches.table import SketchTable
from htm_service.memory.summary import Slot, fill_slots
from htm_service.records import Ints
from htm_service.session_settings import Shape
from storage.base import Block, Summary

SKETCHED_BYTES = 8 << 20
"""Contents of the chunks that are sketched between two batches."""


class Cache:
    """See the head of this module."""

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self.device = device
        self.reclaim = Reclaim(budget_bytes)
        self.num_loads = 0
        self.num_fetched_pages = 0
        self._arenas: dict[Shape, Arena] = {}

    @property
    def budget(self) -> Budget:
        """What is in use of the device's memory, and the limit."""
        return self.reclaim.budget

    @property
    def num_resident(self) -> int:
        """Sessions on the device. Asked by any thread."""
        return len(self.reclaim.resident)

    @property
    def num_arenas(self) -> int:
        """Shapes that have an arena."""
        return len(self._arenas)

    @property
    def key_bytes(self) -> int:
        """Bytes of the summary keys of these and the sketches, room to grow included. Asked by any thread."""
        return sum(chunks.device_key_bytes for one in list(self.reclaim.resident) if (chunks := one.chunks) is not None)

    @property
    def sketch_bytes(self) -> int:
        """Bytes of the sketches among these. Asked by any thread."""
        held = [one.chunks for one in list(self.reclaim.resident)]
        return sum(table.device_bytes for chunks in held if chunks is not None and (table := chunks.sketches))

    def max_fetch(self, resident: Resident) -> int:
        """Pages that may be fetched together: half of what there is, the rest being open chunks and keys."""
        return max(1, resident.held.arena.max_pages // 2)

    def begin_turn(self) -> None:
        """Of what was used until now, anything may go."""
        self.reclaim.turn += 1

    def touch(self, resident: Resident, chunks: Ints | Sequence[int]) -> None:
        """Count chunks as used now."""
        resident.held.touch(np.asarray(chunks), self.reclaim.turn)

    # --- from one state to the next ---

    def want(self, resident: Resident) -> bool:
        """Whether the session is resident, with all its tokens; if not, it is cold or loading. Raises OutOfMemory."""
        if resident.state == "resident":
            self._hold(resident)
            self.reclaim.resident.move_to_end(resident)
            # Not whether something waits: what waited too long was thrown away, and then the session goes cold here.
            extent = resident.extent
            if resident.held.length < extent.length or resident.num_seen < extent.num_truncated:
                self._fill(resident)
        return resident.state == "resident"

    def fill(self, resident: Resident) -> None:
        """Put what waits into the chunks of a session that is resident. It does not count as used by that."""
        if resident.state == "resident" and not resident.is_deleted:
            try:
                self._hold(resident)
                self._fill(resident)
            except HTMError as error:
                logging.getLogger(__name__).warning("session %s goes cold: %s", resident.key, error)
                self.offload(resident)

    def fill_all(self, residents: Sequence[Resident]) -> None:
        """The same for several. One token more, as it waits in lock-step, takes a fifth of the time so."""
        filled: list[tuple[Slot, bytes]] = []
        others: list[Resident] = []
        for resident in residents:
            block = _one_token(resident)
            slot = None if block is None else resident.held.next_slot()
            if block is None or slot is None:
                others.append(resident)
            else:
                resident.pending.popleft()
                filled.append((slot, block.data))
        fill_slots(filled)
        for resident in others:  # afterwards: to make room for them, pages of those above may go
            self.fill(resident)

    def begin_load(self, resident: Resident) -> None:
        """A cold session is loading from now on. Raises OutOfMemory, changing nothing."""
        resident.chunks = self._new_chunks(resident)
        resident.chunks.has_stored_sketches = True
        resident.episodes = []
        resident.num_seen = resident.extent.num_truncated
        resident.state = "loading"
        self.reclaim.loading.add(resident)
        self.num_loads += 1

    def end_load(self, resident: Resident, error: HTMError | None) -> HTMError | None:
        """The loading session is complete, or cannot be; answers what went wrong.

        Nothing did where it was deleted, though it could not be read to its end: who waited will be told that. Nor
        where it was truncated while it was read: it is cold again, and who waited will have it loaded anew.
        """
        if resident.is_deleted:
            error = None
        elif not resident.holds(resident.num_seen):
            self.offload(resident)
            return None
        elif error is None:
            try:
                self._complete(resident)
            except HTMError as reason:
                error = reason
            except Exception as reason:
                logging.getLogger(__name__).exception("session %s could not be loaded", resident.key)
                error = Unhealthy(f"session {resident.id!r} could not be loaded: {reason!r}")
        if error is not None or resident.is_deleted:
            self.offload(resident)
        return error

    def offload(self, resident: Resident) -> None:
        """Give back everything that the session has on the device."""
        self.reclaim.offload(resident)

    def free(self, resident: Resident) -> None:
        """Give back what a deleted session holds; one that is loading goes when its loading ends."""
        if resident.state != "loading":
            self.offload(resident)

    # --- what goes into chunks ---

    def add_keys(self, resident: Resident, first: int, keys: torch.Tensor) -> None:
        """The sealed chunks from `first` on of a loading session, by their keys [m, D]. Raises OutOfMemory."""
        chunks = resident.held
        if first > chunks.num_chunks:  # those between were trimmed while it was loading
            chunks.restart(first)
        keys = keys[chunks.num_chunks - first :]
        if chunks.num_chunks == chunks.first_chunk:  # room for all at once, rather than by and by
            num_chunks = max(len(keys), resident.num_chunks - chunks.first_chunk)
            self.reclaim.make_room(resident, 0, chunks.num_key_bytes_for(num_chunks))
            chunks.reserve(num_chunks)
        chunks.append_keys(keys)

    def add(self, resident: Resident, new: NewTokens) -> None:
        """The next tokens of a session. Raises OutOfMemory, Unhealthy."""
        chunks = resident.held
        if resident.settings.trims:
            new = _after_trims(chunks, new)
        if new.start != chunks.length:
            raise Unhealthy(f"session {resident.id!r}: tokens from {new.start} on do not follow {chunks.length}")
        num_tokens = new.tokens.shape[0]
        at_once = max(1, chunks.arena.max_pages // 4) * chunks.chunk_size  # the first pages go before the last come
        for first in range(0, num_tokens, at_once):
            if num_pages := chunks.num_pages_for(min(at_once, num_tokens - first)):
                self.reclaim.make_room(resident, num_pages, chunks.num_key_bytes_for(num_pages))
            chunks.append(new.tokens[first : first + at_once])
        if num_tokens and (not resident.episodes or resident.episodes[-1].episode != new.episode):
            resident.episodes.append(EpisodeRun(new.start, new.episode))

    def put(self, resident: Resident, contents: Mapping[int, torch.Tensor]) -> None:
        """Pages for sealed chunks of a resident session, whose contents [C, D] were fetched. Raises OutOfMemory."""
        chunks = resident.held
        missing = chunks.missing(list(contents))
        if missing:
            self.reclaim.make_room(resident, len(missing), 0)
            chunks.put(missing, torch.stack([contents[chunk] for chunk in missing]))
            self.touch(resident, missing)
            self.num_fetched_pages += len(missing)

    def begin_sketches(self, resident: Resident) -> SketchTable | None:
        """Have room for the sketches of a session that is searched; where to put those that are stored, if they are to
        be read now.
        """
        is_new = resident.held.sketches is None
        if not self.have_sketch_room(resident):
            return None
        table = resident.held.make_sketches()
        return table if is_new and not table.is_read else None

    def add_sketches(self, resident: Resident, into: SketchTable, stored: Sequence[Summary]) -> None:
        """Some of those that are stored, unless they are not wanted any more."""
        if (chunks := resident.chunks) is None or chunks.sketches is not into:
            return
        for one in stored:
            num_chunks = min(one.num_chunks, chunks.num_sealed - one.first)
            if num_chunks > 0:
                bits, factors = from_bytes([one.data], chunks.arena.dim, chunks.chunk_size)
                into.put_kept(one.first, bits[:num_chunks], factors[:num_chunks])

    def end_sketches(self, resident: Resident, table: SketchTable, num_seen: int) -> None:
        """All that could be read, as of so many truncations, is here; what lacks is made, or all is read again."""
        table.is_read = True
        if not resident.holds(num_seen) and (chunks := resident.chunks) is not None and chunks.sketches is table:
            chunks.drop_sketches()

    def have_sketch_room(self, resident: Resident) -> bool:
        """Have room for sketches of all chunks that a resident session has; False where they are to have none."""
        chunks = resident.held
        if chunks.arena.dim < LEAST_DIM:
            return False
        table = chunks.make_sketches()
        try:
            self.reclaim.make_room(resident, 0, table.num_bytes_for(chunks.num_chunks))
            table.reserve(chunks.num_chunks)  # where many were trimmed there is room, but elsewhere
        except OutOfMemory:
            chunks.drop_sketches()
            return False
        return True

    def sketch(self, resident: Resident) -> bool:
        """Make sketches of some sealed chunks that are here and have none; whether there are more.

        None at all where tokens are narrow, or where there is no room for them: then all tokens are read.
        """
        if resident.state != "resident" or resident.is_deleted or resident.chunks is None:
            return False
        chunks, table = resident.chunks, resident.chunks.sketches
        if table is None or not table.is_read or not self.have_sketch_room(resident):
            return False
        if table.num_known >= chunks.num_sealed - chunks.first_chunk:
            return False
        pages = np.array(chunks.pages, dtype=np.int64)
        missing = table.missing(chunks.num_sealed)
        here = missing[pages[missing - chunks.first_chunk] != NO_PAGE]
        at_once = max(1, SKETCHED_BYTES // chunks.arena.page_bytes)
        some = torch.from_numpy(here[:at_once]).to(self.device)
        if len(some):
            self._put_sketches(chunks, some, chunks.contents(some))
        return len(here) > at_once

    def sketch_contents(self, resident: Resident, contents: Mapping[int, torch.Tensor]) -> None:
        """Make sketches of chunks by their contents [C, D], which were fetched, where they have none."""
        chunks, table = resident.held, resident.held.sketches
        if table is None or not table.is_read or not self.have_sketch_room(resident):
            return
        missing = set(table.missing(chunks.num_sealed).tolist())
        if some := [chunk for chunk in contents if chunk in missing]:
            tokens = torch.stack([contents[chunk] for chunk in some])
            self._put_sketches(chunks, torch.tensor(some, device=self.device), tokens.to(self.device))

    def _put_sketches(self, chunks: Chunks, some: torch.Tensor, tokens: torch.Tensor) -> None:
        keys = chunks.keys[some - chunks.first_chunk]
        chunks.make_sketches().put(some, *sketch(tokens, keys, chunks.arena.rotation))

    def _hold(self, resident: Resident) -> None:
        """Have chunks for a session whose first tokens come. Raises OutOfMemory."""
        if resident.chunks is None:
            resident.chunks = self._new_chunks(resident)
            self.reclaim.resident[resident] = None

    def _fill(self, resident: Resident) -> None:
        """Put what waits into the chunks; a session that outgrows the device, or lacks some of it, goes cold."""
        try:
            if not self._take_pending(resident):
                self.offload(resident)
        except OutOfMemory:
            logging.getLogger(__name__).warning("session %s outgrew the device budget and goes cold", resident.key)
            self.offload(resident)
        except BaseException:
            self.offload(resident)  # some of its tokens may be missing here; storage has all
            raise

    def _complete(self, resident: Resident) -> None:
        """With what was appended while it loaded, a session is resident. Raises HTMError."""
        if not self._take_pending(resident):
            length = resident.extent.length
            raise Unhealthy(f"session {resident.id!r}: {resident.held.length} of {length} tokens are stored")
        if resident.held.first_position > _first_position(resident, resident.extent):
            raise Unhealthy(f"session {resident.id!r}: stored tokens begin at {resident.held.first_position}")
        self.reclaim.loading.discard(resident)
        self.reclaim.resident[resident] = None
        resident.state = "resident"

    def _take_pending(self, resident: Resident) -> bool:
        """Put what waits behind the tokens there are, and trim; whether nothing lacks now. Raises OutOfMemory."""
        extent, chunks = resident.extent, resident.held  # before: what it counts was added to `pending` before it
        blocks: list[Block] = []
        length = chunks.length
        for published in resident.take_pending():
            if published.extent.num_truncated < resident.num_seen:
                continue  # it was read with a load that began later
            if published.num_truncated_before > resident.num_seen:
                return False  # a truncation was published while the session was still cold
            extent = max(extent, published.extent, key=_by_time)
            if (block := published.block) is not None:
                if block.start > length:
                    return False
                if block.start == length:  # else it was read with the load
                    blocks.append(block)
                    length += block.num_tokens
                continue
            if published.child is None:
                stop = published.extent.length
                blocks = [block.within(0, stop) for block in blocks if block.start < stop]
            self._add_all(resident, blocks)
            blocks = []
            if published.child is not None:
                if published.child_extent.length > chunks.length:
                    return False  # so were tokens
                self._share(resident, published.child, published.child_extent)
            elif not self._truncate(resident, published.extent):
                return False
            length = chunks.length
        self._add_all(resident, blocks)
        first_position = _first_position(resident, extent)
        if first_position > chunks.first_position:
            self._trim(resident, first_position)
        return resident.num_seen == extent.num_truncated and chunks.length >= extent.length

    def _add_all(self, resident: Resident, blocks: Sequence[Block]) -> None:
        for new in joined(blocks, resident.settings):
            self.add(resident, new)

    def _truncate(self, resident: Resident, extent: Extent) -> bool:
        """Forget what came after; whether that could be done with what is here. Raises OutOfMemory."""
        if extent.num_truncated == resident.num_seen:
            return True  # it was loaded so
        runs = resident.episodes
        while runs and runs[-1].start >= extent.length:
            runs.pop()
        resident.num_seen = extent.num_truncated
        return resident.held.truncate(extent.length)

    def _share(self, parent: Resident, child: Resident, extent: Extent) -> None:
        """Let a child begin resident with what its parent has here, unless something became of it meanwhile."""
        is_new = child.state == "cold" and not child.is_deleted and not child.num_begun and child.extent == extent
        if not is_new or parent.held.first_position > extent.first_position:
            return
        try:
            child.chunks = parent.held.fork(extent.length)
        except OutOfMemory:
            return  # it begins cold
        if child.chunks is not None:
            child.chunks.trim(child.first_chunk)
            child.episodes = [run for run in parent.episodes if run.start < extent.length]
            self.reclaim.resident[child] = None
            child.state = "resident"

    def _trim(self, resident: Resident, first_position: int) -> None:
        """Forget the tokens before a chunk's begin."""
        resident.held.trim(first_position // resident.settings.chunk_size)
        runs = resident.episodes
        while len(runs) > 1 and runs[1].start <= first_position:
            del runs[0]

    def _new_chunks(self, resident: Resident) -> Chunks:
        """No chunks yet, of the session's width, chunk size and type. Raises OutOfMemory."""
        shape = resident.settings.shape
        arena = self._arenas.get(shape)
        if arena is None:
            # Each reserves address space: those that nobody uses must not pile up, for shapes are the sessions' choice.
            used = {chunks.arena for _, chunks in self.reclaim.on_device()}
            self._arenas = {of: arena for of, arena in self._arenas.items() if arena in used}
            arena = self._arenas[shape] = Arena(*shape, self.device, self.budget)
        return Chunks(arena, self.budget, resident.first_chunk)


def _first_position(resident: Resident, extent: Extent) -> int:
    """Where the session begins; its chunks may be ahead of `extent` by a group or two."""
    return max(extent.first_position, resident.settings.first_position(resident.held.length))


def _one_token(resident: Resident) -> Block | None:
    """The token that is all that waits, and that changes nothing else of a resident session."""
    if resident.state != "resident" or resident.is_deleted or len(resident.pending) != 1:
        return None
    (extent, block, *_), chunks, runs = resident.pending[0], resident.chunks, resident.episodes
    if block is None or block.num_tokens != 1 or chunks is None or block.start != chunks.length:
        return None
    is_of_now = extent.num_truncated == resident.num_seen and extent.first_position <= chunks.first_position
    return block if is_of_now and runs and runs[-1].episode == block.episode else None


def _by_time(extent: Extent) -> tuple[int, int]:
    """Greater for what a session was later."""
    return extent.num_truncated, extent.length


def _after_trims(chunks: Chunks, new: NewTokens) -> NewTokens:
    """What of stored tokens is wanted next, in a session whose first ones may have been trimmed while it was read.

    The store has no gaps but that one: what does not follow begins later because everything before it is gone.
    """
    if new.start > chunks.length:
        chunks.restart(-(-new.start // chunks.chunk_size))
    return new.after(new.start + min(chunks.length - new.start, len(new.tokens)))
