"""One session's chunks on the device: the summary keys of all of them, and the contents of some in pages.

Shapes: D width, C chunk size, n tokens, M = ceil(n / C) chunks.
Storage has every token, so the contents are a cache: a sealed chunk's page may be offloaded at any time and put back
later. The open chunk, which is still written to, keeps its page.
Chunks keep their numbers when the first ones are trimmed: what is held are the chunks `first_chunk` .. M-1,
and `keys`, `page_table`, `pages` and `used_at` begin with the first of them.
A summary key is the mean of a chunk's tokens, as `summary.py` defines it, kept up to date on append.
Does not know queries, models or storage. One thread at a time: the device thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from htm_service.errors import OutOfMemory
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.device import sent
from htm_service.memory.sketches.table import SketchTable
from htm_service.memory.summary import Slot, add_token, mean_of, sum_slots

KEY_ITEMSIZE = 4
NO_PAGE = -1
"""In the page table: the chunk's contents are in storage only."""


class Chunks:
    """See the head of this module. `append` is all or nothing; `free` gives everything back."""

    def __init__(self, arena: Arena, budget: Budget, first_chunk: int = 0) -> None:
        self.arena = arena
        self.first_chunk = first_chunk
        self.length = first_chunk * arena.chunk_size
        self.num_missing = 0
        """Chunks without a page."""
        self.sketches: SketchTable | None = None
        """Those of a session that is searched."""
        self.has_stored_sketches = False
        """Whether the store may have some that are not here: the chunks came from there, or had some before."""
        self._budget = budget
        self._num_trimmed = 0
        """Rows at the beginning of the tables below, of chunks that were trimmed."""
        self._used_at = np.zeros(0, dtype=np.int64)
        self._pages: list[int] = []
        self._open_sum = torch.zeros(arena.dim, dtype=torch.float32, device=arena.device)
        self._keys = torch.empty(0, arena.dim, dtype=torch.float32, device=arena.device)
        self._page_table = torch.empty(0, dtype=torch.int64, device=arena.device)
        self._look()

    @property
    def chunk_size(self) -> int:
        """C."""
        return self.arena.chunk_size

    @property
    def num_chunks(self) -> int:
        """M."""
        return self.first_chunk + len(self._pages)

    @property
    def first_position(self) -> int:
        """The first position that is held."""
        return self.first_chunk * self.chunk_size

    @property
    def pages(self) -> list[int]:
        """Page ids, on the host; NO_PAGE for a chunk whose contents are not here."""
        return self._pages

    @property
    def num_sealed(self) -> int:
        """Full chunks."""
        return self.length // self.chunk_size

    @property
    def device_bytes(self) -> int:
        """Bytes of its pages and keys, capacity included."""
        num_pages = len(self._pages) - self.num_missing
        return num_pages * self.arena.page_bytes + self.device_key_bytes

    @property
    def device_key_bytes(self) -> int:
        """Those of the keys, and of the sketches beside them."""
        sketches = 0 if self.sketches is None else self.sketches.device_bytes
        return self._keys.shape[0] * self._key_bytes + sketches

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that `append` takes for so many tokens."""
        return -(-(self.length + num_tokens) // self.chunk_size) - self.num_chunks

    def num_key_bytes_for(self, num_chunks: int) -> int:
        """Bytes that keys of so many chunks more take from the budget."""
        return (self._capacity_for(len(self._pages) + num_chunks) - self._keys.shape[0]) * self._key_bytes

    @property
    def _key_bytes(self) -> int:
        return self.arena.dim * KEY_ITEMSIZE

    def _look(self) -> None:
        """Renew the views; made here, once, because every read needs them and each costs a call into torch."""
        held = slice(self._num_trimmed, self._num_trimmed + len(self._pages))
        self.keys = self._keys[held]
        """Summary keys [m, D] float32 of the m chunks held, a view."""
        self.page_table = self._page_table[held]
        """Page ids [m] int64, a view."""
        self.used_at = self._used_at[held]
        """When the contents of each were last used, by the owner's clock, a view."""

    def tables(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys [N, D] and page ids [N] of chunks first .. last-1, views; all of them held, or none wanted."""
        if first >= last:
            return self.keys[:0], self.page_table[:0]
        if last - first == len(self._pages):  # all of them, nearly always: to cut a view is a call into torch
            return self.keys, self.page_table
        some = slice(first - self.first_chunk, last - self.first_chunk)
        return self.keys[some], self.page_table[some]

    def append(self, tokens: Tensor) -> None:
        """Add tokens [T, D] of the arena's dtype, from any device. Raises OutOfMemory, changing nothing."""
        size, num_tokens = self.chunk_size, tokens.shape[0]
        if num_new := self.num_pages_for(num_tokens):
            self._add_pages(num_new)
        tokens = tokens.to(self.arena.device)
        head = min(-self.length % size, num_tokens)
        body = (num_tokens - head) // size * size
        if head:
            self._fill_open(tokens[:head])
        if body:
            self._add_sealed(tokens[head : head + body].view(-1, size, self.arena.dim))
        if head + body < num_tokens:
            self._fill_open(tokens[head + body :])

    def next_slot(self) -> Slot | None:
        """Where the next token goes, which counts as held from now on and is the caller's to put there; None where a
        chunk begins with it, or where numpy cannot put it.
        """
        chunk, slot = divmod(self.length, self.chunk_size)
        if self.arena.floats is None or slot == 0:
            return None
        self.length += 1
        place, key = self.arena.floats[self._page_of(chunk), slot], self._keys.numpy()[self._row(chunk)]
        return Slot(place, self._open_sum.numpy(), key, slot)

    def _add_pages(self, num_new: int) -> None:
        """Take pages for `num_new` chunks more, all or none."""
        self.reserve(len(self._pages) + num_new)
        pages = self.arena.allocate(num_new)
        first = self._row(self.num_chunks)
        self._pages += pages
        self._page_table[first : first + num_new] = _ints(pages, self._page_table.device)
        self._look()

    def append_keys(self, keys: Tensor) -> None:
        """Add sealed chunks of which only the keys [m, D] are known. Raises OutOfMemory, changing nothing."""
        assert self.length % self.chunk_size == 0, "keys follow sealed chunks only"
        self.reserve(len(self._pages) + len(keys))
        first = self._row(self.num_chunks)
        self._pages += [NO_PAGE] * len(keys)
        self._page_table[first : first + len(keys)] = NO_PAGE
        self._keys[first : first + len(keys)] = keys.to(self.arena.device)
        self.num_missing += len(keys)
        self.length += len(keys) * self.chunk_size
        self._look()

    def missing(self, chunks: Sequence[int]) -> list[int]:
        """Those of the chunks that are held and have no page."""
        if not self.num_missing:
            return []
        first = self.first_chunk
        return [chunk for chunk in chunks if chunk >= first and self._pages[chunk - first] == NO_PAGE]

    def put(self, chunks: Sequence[int], contents: Tensor) -> None:
        """Give sealed chunks without a page their contents [N, C, D] back. Raises OutOfMemory, changing nothing."""
        pages = self.arena.allocate(len(chunks))
        self.arena.put(pages, contents.to(self.arena.device))
        self._set_pages(chunks, pages)
        self.num_missing -= len(chunks)

    def offloadable(self) -> npt.NDArray[np.int64]:
        """The sealed chunks that have a page."""
        sealed = self._pages[: self.num_sealed - self.first_chunk]
        return np.flatnonzero(np.array(sealed, dtype=np.int64) != NO_PAGE) + self.first_chunk

    def page(self, chunk: int) -> Tensor:
        """The page [C, D] of a chunk that has one, a view."""
        return self.arena.page(self._page_of(chunk))

    def offload(self, chunks: Sequence[int]) -> None:
        """Give the pages of sealed chunks back; storage has their contents."""
        self.arena.free([self._page_of(chunk) for chunk in chunks])
        self._set_pages(chunks, [NO_PAGE] * len(chunks))
        self.num_missing += len(chunks)

    def trim(self, first_chunk: int) -> None:
        """Forget the sealed chunks before `first_chunk`, keys and all."""
        num_chunks = min(first_chunk, self.num_sealed) - self.first_chunk
        if num_chunks <= 0:
            return
        pages = [page for page in self._pages[:num_chunks] if page != NO_PAGE]
        self.arena.free(pages)
        self.num_missing -= num_chunks - len(pages)
        del self._pages[:num_chunks]
        if self.sketches is not None:
            self.sketches.trim(self.first_chunk + num_chunks)
        self.first_chunk += num_chunks
        self._num_trimmed += num_chunks
        self._look()

    def truncate(self, length: int) -> bool:
        """Forget the tokens from position `length` on; False, and nothing is changed, where the chunk that is cut has
        no page. Raises OutOfMemory, changing nothing, where another session holds that page.
        """
        if length < self.first_position:
            self.restart(length // self.chunk_size)
        if length >= self.length:
            return True
        chunk, num_left = divmod(length, self.chunk_size)
        num_kept = chunk - self.first_chunk + (num_left > 0)
        if num_left and not self._open_again(chunk, num_left):
            return False
        gone = [page for page in self._pages[num_kept:] if page != NO_PAGE]
        self.num_missing -= len(self._pages) - num_kept - len(gone)
        self.arena.free(gone)
        del self._pages[num_kept:]
        if self.sketches is not None:
            self.sketches.cut(chunk)
        self.used_at[num_kept:] = 0
        self.length = length
        self._look()
        return True

    def _open_again(self, chunk: int, num_left: int) -> bool:
        """Make a chunk the open one, of so many of its tokens; whether it has a page."""
        page = self._page_of(chunk)
        if page == NO_PAGE:
            return False
        if self.arena.is_shared(page):
            (mine,) = self.arena.allocate(1)
            self.arena.page(mine).copy_(self.arena.page(page))
            self._set_pages([chunk], [mine])
            self.arena.free([page])
        self._open_sum = sum_slots(self.page(chunk)[None, :num_left])[0]
        mean_of(self._open_sum, num_left, out=self._keys[self._row(chunk)])
        return True

    def fork(self, length: int) -> Chunks | None:
        """The first `length` tokens as another session's, or None where the chunk that is cut has no page.

        Pages of sealed chunks are shared, keys copied. Raises OutOfMemory, changing nothing.
        """
        chunk, num_left = divmod(length, self.chunk_size)
        if num_left and self._page_of(chunk) == NO_PAGE:
            return None
        child = Chunks(self.arena, self._budget, self.first_chunk)
        child.has_stored_sketches = True
        num_sealed = chunk - self.first_chunk
        try:
            child.reserve(num_sealed + (num_left > 0))
            child.append_keys(self.keys[:num_sealed])
            child.adopt(self._pages[:num_sealed])
            child.used_at[:] = self.used_at[:num_sealed]
            if num_left:
                child.append(self.page(chunk)[:num_left])
        except OutOfMemory:
            child.free()
            raise
        return child

    def adopt(self, pages: Sequence[int]) -> None:
        """Hold these pages, which others hold too, for the chunks that have none; NO_PAGE among them stays so."""
        here = [(self.first_chunk + place, page) for place, page in enumerate(pages) if page != NO_PAGE]
        if here:
            self.arena.share([page for _, page in here])
            self._set_pages([chunk for chunk, _ in here], [page for _, page in here])
            self.num_missing -= len(here)

    def restart(self, first_chunk: int) -> None:
        """Forget everything: the next chunk is `first_chunk`."""
        self.free()
        self.first_chunk = first_chunk
        self.length = first_chunk * self.chunk_size

    def chunks_in(self, slab: int) -> npt.NDArray[np.int64]:
        """The chunks whose pages lie in a slab of the arena."""
        inside = np.array(self._pages, dtype=np.int64) // self.arena.slab_pages == slab
        return np.flatnonzero(inside) + self.first_chunk

    def ages(self, chunks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """When the contents of these chunks were last used."""
        return self.used_at[chunks - self.first_chunk]

    def touch(self, chunks: npt.NDArray[np.int64], now: int) -> None:
        """Count the contents of these chunks as used now; -1 stands for none."""
        self.used_at[chunks[chunks >= 0] - self.first_chunk] = now

    def move(self, chunk: int, slab: int) -> None:
        """Move a chunk's contents out of a slab; another one must have a free page."""
        page = self._page_of(chunk)
        (new,) = self.arena.allocate(1, avoid=slab)
        self.arena.page(new).copy_(self.arena.page(page))
        self._set_pages([chunk], [new])
        self.arena.free([page])

    def _set_pages(self, chunks: Sequence[int], pages: Sequence[int]) -> None:
        for chunk, page in zip(chunks, pages, strict=True):
            self._pages[chunk - self.first_chunk] = page
        device = self._page_table.device
        self._page_table[_ints([self._row(chunk) for chunk in chunks], device)] = _ints(pages, device)

    def make_sketches(self) -> SketchTable:
        """The sketches, from now on there are some. Whose budget they are of is this session's."""
        if self.sketches is None:
            self.sketches = SketchTable(
                self.arena.dim, self.chunk_size, self.arena.device, self._budget, self.first_chunk
            )
            self.sketches.is_read = not self.has_stored_sketches
        return self.sketches

    def drop_sketches(self) -> None:
        """Give what the sketches take back."""
        if self.sketches is not None:
            self.sketches.free()
            self.sketches, self.has_stored_sketches = None, True

    def contents(self, chunks: Tensor) -> Tensor:
        """A copy of the contents of chunks [N] (int64 indexes) that have pages: [N, C, D].

        Slots past the end are undefined.
        """
        return self.arena.take(self.page_table[chunks - self.first_chunk])

    def contents_on_host(self, chunks: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The same in float32, on the host."""
        return self.arena.take_to_host([self._page_of(chunk) for chunk in chunks.tolist()])

    def free(self) -> None:
        """Give pages and keys back; nothing is held afterwards."""
        self.arena.free([page for page in self._pages if page != NO_PAGE])
        self._budget.give(self._keys.shape[0] * self._key_bytes)
        self.drop_sketches()
        self._pages = []
        self._keys = self._keys[:0].clone()
        self._page_table = self._page_table[:0].clone()
        self._used_at = self._used_at[:0].copy()
        self.length = self.first_chunk = self.num_missing = self._num_trimmed = 0
        self._look()

    def _row(self, chunk: int) -> int:
        """Where a chunk is in the tables."""
        return self._num_trimmed + chunk - self.first_chunk

    def _page_of(self, chunk: int) -> int:
        return self._pages[chunk - self.first_chunk]

    def _fill_open(self, tokens: Tensor) -> None:
        """Add 1 to C tokens, none of which crosses a chunk's end."""
        chunk, slot = divmod(self.length, self.chunk_size)
        num_tokens = tokens.shape[0]  # torch's `len` takes microseconds
        self.page(chunk)[slot : slot + num_tokens] = tokens
        if slot == 0:
            self._open_sum.zero_()
        for place in range(num_tokens):
            add_token(self._open_sum, tokens[place])
        self.length += num_tokens
        mean_of(self._open_sum, slot + num_tokens, out=self._keys[self._row(chunk)])

    def _add_sealed(self, chunks: Tensor) -> None:
        """Add whole chunks [m, C, D] at a chunk's boundary."""
        first, num_chunks = self.length // self.chunk_size - self.first_chunk, chunks.shape[0]
        self.arena.put(self._pages[first : first + num_chunks], chunks)
        mean_of(sum_slots(chunks), self.chunk_size, out=self.keys[first : first + num_chunks])
        self.length += num_chunks * self.chunk_size

    def _capacity_for(self, num_chunks: int) -> int:
        """Chunks there is room for when `num_chunks` are held: grown by half, unless many were trimmed."""
        capacity = self._keys.shape[0]
        if self._num_trimmed + num_chunks <= capacity or num_chunks <= capacity * 3 // 4:
            return capacity
        return max(num_chunks, capacity + max(4, capacity // 2))

    def reserve(self, num_chunks: int) -> None:
        """Have room for so many chunks to be held. Raises OutOfMemory, changing nothing."""
        capacity = self._capacity_for(num_chunks)
        more = capacity - self._keys.shape[0]
        if not more and self._num_trimmed + num_chunks <= capacity:
            return
        self._budget.take(more * self._key_bytes)
        held = len(self._pages)
        keys = torch.empty(capacity, self.arena.dim, dtype=torch.float32, device=self.arena.device)
        keys[:held] = self.keys
        page_table = torch.zeros(capacity, dtype=torch.int64, device=self.arena.device)
        page_table[:held] = self.page_table
        self._used_at = np.pad(self.used_at, (0, capacity - held))
        self._keys, self._page_table, self._num_trimmed = keys, page_table, 0
        self._look()


def _ints(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers on the device, without waiting for what it does: copies of pages may be under way."""
    return sent(torch.from_numpy(np.array(numbers, dtype=np.int64)), device)  # torch.tensor takes four times as long
