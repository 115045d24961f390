"""The sketches of one session's chunks on the device, of those that have any; they are counted with the keys.

Chunks keep their numbers, as in `chunks.py`, and a chunk without sketches has the factor NaN. The store keeps sketches
too: until those that it has were read into the table, none are made, and of each is known whether it has it.
Shapes: N chunks, C chunk size, W words of a sketch. Does not know tokens. One thread at a time: the device thread.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from htm_service.memory.arena import Budget
from htm_service.memory.sketches.code import num_words, sketch_bytes


class SketchTable:
    """See the head of this module."""

    def __init__(self, dim: int, chunk_size: int, device: torch.device, budget: Budget, first_chunk: int) -> None:
        self.first_chunk = first_chunk
        self.num_known = 0
        """Chunks that have sketches."""
        self.num_unkept = 0
        """Those of them that the store does not have. Asked by any thread."""
        self.is_read = False
        """Whether what the store has is here."""
        self._budget = budget
        self._num_trimmed = 0
        """Rows at the beginning, of chunks that were trimmed."""
        self._chunk_bytes = chunk_size * sketch_bytes(dim)
        self._bits = torch.zeros(0, num_words(dim), chunk_size, dtype=torch.int64, device=device)
        self._factors = torch.full((0, chunk_size), torch.nan, device=device)
        self._is_kept = np.zeros(0, dtype=bool)

    @property
    def device_bytes(self) -> int:
        """Capacity included."""
        return len(self._factors) * self._chunk_bytes

    def num_bytes_for(self, last_chunk: int) -> int:
        """Bytes that room for the chunks before `last_chunk` takes from the budget."""
        return max(0, self._capacity_for(last_chunk) - len(self._factors)) * self._chunk_bytes

    def reserve(self, last_chunk: int) -> None:
        """Have room for the chunks before `last_chunk`. Raises OutOfMemory, changing nothing."""
        if self._row(last_chunk) <= len(self._factors):
            return
        capacity = self._capacity_for(last_chunk)
        self._budget.take(max(0, capacity - len(self._factors)) * self._chunk_bytes)
        held = slice(self._num_trimmed, None)
        num_held = len(self._factors) - self._num_trimmed
        bits = self._bits.new_zeros(capacity, *self._bits.shape[1:])
        factors = self._factors.new_full((capacity, self._factors.shape[1]), torch.nan)
        bits[:num_held], factors[:num_held] = self._bits[held], self._factors[held]
        self._is_kept = np.pad(self._is_kept[held], (0, capacity - num_held))
        self._bits, self._factors, self._num_trimmed = bits, factors, 0

    def tables(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Bits [N, W, C] and factors [N, C] of chunks first .. last-1, for which there is room: views."""
        assert self._row(last) <= len(self._factors), "a kernel would read beyond them"
        some = slice(self._row(first), self._row(last))
        return self._bits[some], self._factors[some]

    def missing(self, last_chunk: int) -> npt.NDArray[np.int64]:
        """The chunks before `last_chunk`, for which there is room, that have no sketches."""
        _, factors = self.tables(self.first_chunk, last_chunk)
        return np.flatnonzero(factors[:, 0].isnan().cpu().numpy()) + self.first_chunk

    def put(self, chunks: Tensor, bits: Tensor, factors: Tensor) -> None:
        """Have the sketches of chunks [N] (int64), for which there is room, and which the store does not have."""
        rows = chunks + self._row(0)
        self._bits[rows], self._factors[rows] = bits, factors
        self._is_kept[rows.cpu().numpy()] = False
        self._count()

    def put_kept(self, first: int, bits: Tensor, factors: Tensor) -> None:
        """Have what the store has of the chunks from `first` on, as far as there is room."""
        low, high = max(first, self.first_chunk), min(first + len(factors), len(self._factors) - self._row(0))
        if low < high:
            rows, some = slice(self._row(low), self._row(high)), slice(low - first, high - first)
            device = self._bits.device
            num_new = high - low - int(self._is_known(rows).sum())
            self._bits[rows], self._factors[rows] = bits[some].to(device), factors[some].to(device)
            self.num_known += num_new
            self.num_unkept += num_new
            self.have_kept(low, high)

    def have_kept(self, first: int, last: int) -> None:
        """The store has those of the chunks first .. last-1 now; some may have been trimmed meanwhile."""
        rows = slice(max(self._row(first), self._num_trimmed), max(self._row(last), self._num_trimmed))
        is_new = self._is_known(rows) & ~self._is_kept[rows]
        self._is_kept[rows] |= is_new
        self.num_unkept -= int(is_new.sum())

    def unkept(self, least: int, most: int) -> tuple[int, int] | None:
        """The first chunks, at least and at most so many, that follow each other and that the store does not have."""
        held = slice(self._num_trimmed, None)
        is_wanted = self._is_known(held) & ~self._is_kept[held]
        edges = np.flatnonzero(np.diff(np.pad(is_wanted.astype(np.int8), 1))).reshape(-1, 2) + self.first_chunk
        runs = ((int(first), int(last)) for first, last in edges if last - first >= least)
        return next(((first, min(last, first + most)) for first, last in runs), None)

    def trim(self, first_chunk: int) -> None:
        """Forget the chunks before `first_chunk`."""
        self._num_trimmed = min(self._num_trimmed + first_chunk - self.first_chunk, len(self._factors))
        self.first_chunk = first_chunk
        self._count()

    def cut(self, last_chunk: int) -> None:
        """Forget the chunks from `last_chunk` on; they may be other ones next time."""
        cut = slice(self._row(max(last_chunk, self.first_chunk)), None)
        self._factors[cut], self._is_kept[cut] = torch.nan, False
        self._count()

    def free(self) -> None:
        """Give everything back."""
        self._budget.give(self.device_bytes)
        self._bits, self._factors, self._num_trimmed = self._bits[:0].clone(), self._factors[:0].clone(), 0
        self._is_kept = self._is_kept[:0].copy()
        self._count()

    def _row(self, chunk: int) -> int:
        return chunk - self.first_chunk + self._num_trimmed

    def _is_known(self, rows: slice) -> npt.NDArray[np.bool_]:
        is_known: npt.NDArray[np.bool_] = ~self._factors[rows, 0].isnan().cpu().numpy()
        return is_known

    def _count(self) -> None:
        held = slice(self._num_trimmed, None)
        self.num_known = int(self._is_known(held).sum())
        self.num_unkept = self.num_known - int(self._is_kept[held].sum())

    def _capacity_for(self, last_chunk: int) -> int:
        """Grown by half, unless many were trimmed."""
        capacity, wanted = len(self._factors), last_chunk - self.first_chunk
        if self._row(last_chunk) <= capacity or wanted <= capacity * 3 // 4:
            return capacity
        return max(wanted, capacity + max(4, capacity // 2))
