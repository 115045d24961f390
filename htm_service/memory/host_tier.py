"""Between device and store: sealed chunks that had to leave the device, in host memory, under a budget of its own.

    device --keep()--> here --read()--> device        what does not fit here either is in the store, as everything is

What was kept least recently goes first; before that, what came back to the device since: the two tiers hold the same
chunk only as long as nobody needs the room, and then it leaves the device without being copied again.
Chunks that somebody is about to read are held: they stay until they are released. Which chunks of a session are
here is in `session.host_pages`. Contents of sealed chunks never change, so what is here equals what is stored, also
while its session is cold.

With a GPU the memory is page-locked, and copies either way are enqueued on the device's stream; the device thread
goes on at once. Only that thread, always on the same stream, copies to and from these pages, and nothing on the CPU
reads or writes them. So the stream's order is all that is needed: a page on the device is not overwritten before it
was copied, a page here is not copied back before its contents have come, nor used again before it was copied. A slab
that is given back may still be copied from: torch's allocator of page-locked memory, which was told of each copy,
gives it to nobody before the stream is past them.

With a budget of 0 nothing is ever kept. Does not know requests, the loader or the store. Methods run on the device
thread.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from htm_service.errors import OutOfMemory
from htm_service.memory.arena import Arena, Budget
from htm_service.session_settings import Shape
from htm_service.sessions.session import Session

SLAB_BYTES = 32 << 20
"""Size of one allocation of page-locked memory, for which the device thread waits; smaller under a small budget."""

Chunk = tuple[Session, int]


class HostTier:
    """See the head of this module. `device` is the one whose chunks are kept."""

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self.budget = Budget(budget_bytes)
        self.num_read = 0
        """Chunks that were read from here."""
        self._device = device
        self._arenas: dict[Shape, Arena] = {}
        self._order: OrderedDict[Chunk, None] = OrderedDict()
        """What is here and not held; the next to go stands first."""
        self._held: Counter[Chunk] = Counter()

    def keep(self, session: Session, chunks: npt.NDArray[np.int64]) -> None:
        """Copy sealed chunks that have a page on the device, the most valuable last, as far as there is room."""
        if not self.budget.limit_bytes or session.is_deleted or not len(chunks):
            return
        wanted = [chunk for chunk in chunks.tolist() if chunk >= session.first_chunk]  # the others were evicted
        for chunk in wanted:
            if (key := (session, chunk)) in self._order:
                self._order.move_to_end(key)
        try:
            self._copy(session, [chunk for chunk in wanted if chunk not in session.host_pages])
        except OutOfMemory as error:
            self.budget.limit_bytes = self.budget.used_bytes  # to try again would cost time at each chunk
            logging.getLogger(__name__).warning(
                "the host tier stays at %d bytes from now on: %s", self.budget.limit_bytes, error
            )

    def _copy(self, session: Session, chunks: list[int]) -> None:
        memory, arena = session.memory, self._arena(session.settings.shape)
        assert memory is not None, "it has pages on the device"
        self._make_room(arena, min(len(chunks), arena.max_pages))  # nobody goes for a chunk that never fits
        chunks = chunks[max(0, len(chunks) - arena.num_available) :]
        pages = arena.allocate(len(chunks))
        for chunk, page in zip(chunks, pages, strict=True):
            arena.page(page).copy_(memory.page(chunk), non_blocking=True)
            session.host_pages[chunk] = page
            self._order[session, chunk] = None

    def let_go(self, session: Session, chunks: Iterable[int]) -> None:
        """Forget chunks that were evicted, as far as they are here."""
        for chunk in chunks:
            if chunk in session.host_pages:
                self._discard(session, chunk)

    def forget(self, session: Session) -> None:
        """Forget everything of a session."""
        self.let_go(session, list(session.host_pages))

    # --- reading ---

    def hold(self, wanted: Mapping[Session, Sequence[int]]) -> dict[Session, set[int]]:
        """What of the wanted chunks is here, of each session; it stays until it is released."""
        held = {one: {chunk for chunk in chunks if chunk in one.host_pages} for one, chunks in wanted.items()}
        for session, chunk in _each(held):
            self._held[session, chunk] += 1
            self._order.pop((session, chunk), None)
        return held

    def read(self, session: Session, chunks: Iterable[int]) -> dict[int, Tensor]:
        """The contents [C, D] of held chunks, on the device; without those that were forgotten meanwhile.

        Valid until they are released: on a CPU these are views.
        """
        found = {
            chunk: self._arenas[session.settings.shape].page(page).to(self._device, non_blocking=True)
            for chunk in chunks
            if (page := session.host_pages.get(chunk)) is not None
        }
        self.num_read += len(found)
        return found

    def release(self, held: Mapping[Session, Set[int]]) -> None:
        """End a hold. What is on the device now is the first to go from here, what was read only the last."""
        for session, chunk in _each(held):
            key = session, chunk
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]
                if chunk in session.host_pages:
                    self._order[key] = None
                    is_on_device = session.memory is not None and not session.memory.missing([chunk])
                    self._order.move_to_end(key, last=not is_on_device)

    # --- room ---

    def _make_room(self, arena: Arena, num_pages: int) -> None:
        """Let the oldest go, of whatever shape, until so many pages can be taken or nothing is left that may go."""
        while self._order and (missing := num_pages - arena.num_available) > 0:
            for session, chunk in list(itertools.islice(self._order, missing)):
                self._discard(session, chunk)

    def _discard(self, session: Session, chunk: int) -> None:
        self._order.pop((session, chunk), None)
        self._arenas[session.settings.shape].free([session.host_pages.pop(chunk)])

    def _arena(self, shape: Shape) -> Arena:
        arena = self._arenas.get(shape)
        if arena is None:
            # Each reserves address space, so those that hold nothing must not pile up.
            self._arenas = {of: arena for of, arena in self._arenas.items() if any(arena.slab_addresses)}
            is_pinned, host = self._device.type == "cuda", torch.device("cpu")
            arena = Arena(*shape, host, self.budget, slab_bytes=SLAB_BYTES, is_pinned=is_pinned)
            self._arenas[shape] = arena
        return arena


def _each(chunks: Mapping[Session, Iterable[int]]) -> list[Chunk]:
    return [(session, chunk) for session, some in chunks.items() for chunk in some]
