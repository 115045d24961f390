"""What goes when room is short on the device: the pages used least recently, then whole sessions.

Storage has everything, so a sealed chunk's page may be offloaded at any time, and so may a session. Use is counted in
turns of the device thread: what was used, or brought, in the turn at hand stays until it is over.
Does not know why room is wanted, nor how anything comes back. Methods run on the device thread.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from htm_service.errors import OutOfMemory
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import NO_PAGE, Chunks
from htm_service.memory.resident import Resident

OFFLOAD_SHARE = 32
"""Where room is needed, one page of so many goes at once: looking for the oldest costs as much for one as for many."""


class Reclaim:
    """See the head of this module."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget = Budget(budget_bytes)
        self.resident: OrderedDict[Resident, None] = OrderedDict()
        """The resident sessions that have chunks, the one used least recently first."""
        self.loading: set[Resident] = set()
        self.num_offloaded_sessions = 0
        """To make room."""
        self.num_offloaded_pages = 0
        """Of sessions that stayed."""
        self.turn = 1
        """The turn at hand; what was never used counts as used in turn 0."""

    def offload(self, resident: Resident) -> None:
        """Take a session off the device: it is cold then."""
        self.resident.pop(resident, None)
        self.loading.discard(resident)
        resident.state = "cold"  # first: what is added to `pending` from now on is on disk before it is loaded
        if resident.chunks is not None:
            resident.chunks.free()
        resident.chunks = None
        resident.pending.clear()

    def make_room(self, keep: Resident, num_pages: int, num_key_bytes: int) -> None:
        """Offload until so much can be taken, nothing of `keep` itself but old pages. Raises OutOfMemory."""
        arena = keep.held.arena
        while self.budget.free_bytes < num_key_bytes:
            if not self._empty_slab() and not self._offload_oldest(keep):
                raise self._out_of_memory(keep, f"{num_key_bytes} bytes for summary keys")
        if num_key_bytes:  # taken at once, so that pages do not take it
            self.budget.take(num_key_bytes)
        try:
            while (missing := num_pages - arena.num_available) > 0:
                if not self._offload_pages(arena, missing) and not self._offload_oldest(keep):
                    raise self._out_of_memory(keep, f"{missing} pages of {arena.page_bytes} bytes")
        finally:
            if num_key_bytes:
                self.budget.give(num_key_bytes)

    def on_device(self) -> Iterator[tuple[Resident, Chunks]]:
        """The sessions that have chunks, loading ones too."""
        for resident in itertools.chain(self.resident, self.loading):
            if resident.chunks is not None:
                yield resident, resident.chunks

    def _out_of_memory(self, resident: Resident, needs: str) -> OutOfMemory:
        used, limit = self.budget.used_bytes, self.budget.limit_bytes
        return OutOfMemory(
            f"session {resident.id!r} needs {needs} more on the device, {used} of {limit} bytes are in use"
        )

    def _offload_pages(self, arena: Arena, num_pages: int) -> int:
        """Offload the pages of an arena that were used least recently; how many went."""
        candidates = [
            (chunks, sealed[old])
            for chunks in self._in(arena)
            if len(old := chunks.ages(sealed := chunks.offloadable()) < self.turn)
        ]
        ages = np.concatenate([chunks.ages(sealed) for chunks, sealed in candidates] or [np.empty(0, np.int64)])
        num_pages = min(len(ages), max(num_pages, len(ages) // OFFLOAD_SHARE))
        if not num_pages:
            return 0
        newest = np.partition(ages, num_pages - 1)[num_pages - 1]
        rest = num_pages
        for chunks, sealed in candidates:
            going = sealed[chunks.ages(sealed) <= newest][:rest]
            self._offload(chunks, going)
            rest -= len(going)
        return num_pages

    def _offload(self, chunks: Chunks, going: npt.NDArray[np.int64]) -> None:
        chunks.offload(going.tolist())
        self.num_offloaded_pages += len(going)

    def _empty_slab(self) -> bool:
        """Give the slab whose pages are the least used back to the budget; whether that could be done.

        Its sealed chunks are offloaded, what must stay moves to other slabs.
        """
        arenas = {chunks.arena for _, chunks in self.on_device()}
        found = [(age, arena, slab) for arena in arenas for slab, age in self._ages(arena).items()]
        for _, arena, slab in sorted(found, key=lambda entry: entry[0]):
            staying: list[tuple[Chunks, int]] = []
            for chunks in self._in(arena):
                inside = chunks.chunks_in(slab)
                is_old = (inside < chunks.num_sealed) & (chunks.ages(inside) < self.turn)
                self._offload(chunks, inside[is_old])
                staying.extend((chunks, chunk) for chunk in inside[~is_old].tolist())
            missing = len(staying) - arena.num_free_outside(slab)
            if missing <= 0 or self._offload_pages(arena, missing) >= missing:
                for chunks, chunk in staying:
                    chunks.move(chunk, slab)
                return True
        return False

    def _ages(self, arena: Arena) -> dict[int, float]:
        """Per slab of an arena, when its pages were used on average."""
        held = self._in(arena)
        pages = np.concatenate([np.array(chunks.pages, np.int64) for chunks in held] or [np.empty(0, np.int64)])
        used_at = np.concatenate([chunks.used_at for chunks in held] or [np.empty(0, np.int64)])
        slabs = pages[pages != NO_PAGE] // arena.slab_pages
        sums, counts = np.bincount(slabs, used_at[pages != NO_PAGE]), np.bincount(slabs)
        return {slab: float(sums[slab] / counts[slab]) for slab in np.flatnonzero(counts).tolist()}

    def _offload_oldest(self, keep: Resident) -> bool:
        """The session that was used least recently goes cold, if there is another one."""
        victim = next((other for other in self.resident if other is not keep and other.extent.length), None)
        if victim is None:
            return False
        self.num_offloaded_sessions += 1
        self.offload(victim)
        return True

    def _in(self, arena: Arena) -> list[Chunks]:
        """The chunks whose pages are in an arena."""
        return [chunks for _, chunks in self.on_device() if chunks.arena is arena]
