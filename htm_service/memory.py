"""One session's chunks on the device: pages of contents, and beside them the summary keys.

Shapes: D width, C chunk size, n tokens, M = ceil(n / C) chunks.
A summary key is the float32 mean of a chunk's tokens, its sum accumulated slot by slot. That order does not
depend on how the tokens arrived, so the same tokens give the same key to the last bit: appended one by one,
at once, or read back after a restart.
Does not know queries, models or storage. One thread at a time: the device thread.
"""

from __future__ import annotations

import torch
from torch import Tensor

from htm_service.arena import Arena, Budget

KEY_ITEMSIZE = 4


def sum_slots(tokens: Tensor, visible: Tensor | None = None) -> Tensor:
    """Sum the tokens [m, C, D] of m chunks, or only those `visible` [m, C], slot by slot: [m, D] float32."""
    total = torch.zeros(tokens.shape[0], tokens.shape[2], dtype=torch.float32, device=tokens.device)
    for slot in range(tokens.shape[1]):
        token = tokens[:, slot].float()
        total += token if visible is None else token.masked_fill(~visible[:, slot, None], 0.0)
    return total


class Memory:
    """See the head of this module. `append` is all or nothing; `release` gives everything back."""

    def __init__(self, arena: Arena, budget: Budget) -> None:
        self.arena = arena
        self.length = 0
        self._budget = budget
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
        return len(self._pages)

    @property
    def pages(self) -> list[int]:
        """Page ids, on the host."""
        return self._pages

    @property
    def device_bytes(self) -> int:
        """Bytes of its pages and keys, capacity included."""
        return self.num_chunks * self.arena.page_bytes + self._keys.shape[0] * self._key_bytes

    @property
    def _key_bytes(self) -> int:
        return self.arena.dim * KEY_ITEMSIZE

    def _look(self) -> None:
        """Renew the views; made here, once, because every read needs them and each costs a call into torch."""
        self.keys = self._keys[: self.num_chunks]
        """Summary keys [M, D] float32, a view."""
        self.page_table = self._page_table[: self.num_chunks]
        """Page ids [M] int64, a view."""

    def append(self, tokens: Tensor) -> None:
        """Add tokens [T, D] of the arena's dtype, from any device. Raises OutOfMemory, changing nothing."""
        size = self.chunk_size
        num_new = -(-(self.length + len(tokens)) // size) - self.num_chunks
        if num_new:
            self._add_pages(num_new)
        tokens = tokens.to(self.arena.device)
        head = min(-self.length % size, len(tokens))
        body = (len(tokens) - head) // size * size
        self._fill_open(tokens[:head] if head < len(tokens) else tokens)
        if body:
            self._add_sealed(tokens[head : head + body].view(-1, size, self.arena.dim))
        if head + body < len(tokens):
            self._fill_open(tokens[head + body :])

    def _add_pages(self, num_new: int) -> None:
        """Take pages for `num_new` chunks more, all or none."""
        first = self.num_chunks
        self._reserve_keys(first + num_new)
        pages = self.arena.allocate(num_new)
        self._pages += pages
        self._page_table[first : first + num_new] = torch.tensor(pages)
        self._look()

    def contents(self, chunks: Tensor) -> Tensor:
        """A copy of the contents of chunks [N] (int64 indexes): [N, C, D]; slots past the end are undefined."""
        return self.arena.take(self.page_table[chunks])

    def release(self) -> None:
        """Give pages and keys back; the memory is empty afterwards."""
        self.arena.free(self._pages)
        self._budget.give(self._keys.shape[0] * self._key_bytes)
        self._pages = []
        self._keys = self._keys[:0].clone()
        self._page_table = self._page_table[:0].clone()
        self.length = 0
        self._look()

    def _fill_open(self, tokens: Tensor) -> None:
        """Add fewer than C tokens, none of which crosses a chunk's end."""
        if not len(tokens):
            return
        chunk, slot = divmod(self.length, self.chunk_size)
        self.arena.page(self._pages[chunk])[slot : slot + len(tokens)] = tokens
        if slot == 0:
            self._open_sum.zero_()
        for place in range(len(tokens)):
            self._open_sum += tokens[place]
        self.length += len(tokens)
        torch.div(self._open_sum, slot + len(tokens), out=self._keys[chunk])

    def _add_sealed(self, chunks: Tensor) -> None:
        """Add whole chunks [m, C, D] at a chunk's boundary."""
        first = self.length // self.chunk_size
        self.arena.put(self._pages[first : first + len(chunks)], chunks)
        self._keys[first : first + len(chunks)] = sum_slots(chunks) / self.chunk_size
        self.length += len(chunks) * self.chunk_size

    def _reserve_keys(self, num_chunks: int) -> None:
        capacity = self._keys.shape[0]
        if num_chunks <= capacity:
            return
        capacity = max(num_chunks, capacity + max(4, capacity // 2))
        self._budget.take((capacity - self._keys.shape[0]) * self._key_bytes)
        keys = torch.empty(capacity, self.arena.dim, dtype=torch.float32, device=self.arena.device)
        keys[: self.num_chunks] = self._keys[: self.num_chunks]
        page_table = torch.zeros(capacity, dtype=torch.int64, device=self.arena.device)
        page_table[: self.num_chunks] = self._page_table[: self.num_chunks]
        self._keys, self._page_table = keys, page_table
