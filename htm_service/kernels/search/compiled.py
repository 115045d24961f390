"""Searches on a CPU, compiled: the chunks shared out over the cores, without the interpreter's lock.

Does not know sessions, requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from htm_service.kernels.compiled import CompiledKernel, pages_of
from htm_service.kernels.loops import Array
from htm_service.kernels.search import loops
from htm_service.kernels.search.base import SPREAD, Found, TokenSearch
from htm_service.memory.arena import Arena
from htm_service.memory.sketches.code import ERROR

BYTES_PER_THREAD = 4 << 20
"""Of sketches with queries; fewer are gone over by one core before another one is awake."""
ROWS_PER_THREAD = 4
"""Whose tokens are scored."""


class CompiledSearch:
    """See the head of this module. Shares the threads of the kernel that answers attends."""

    prefers_tokens = False

    def __init__(self, kernel: CompiledKernel, bytes_per_thread: int = BYTES_PER_THREAD) -> None:
        self._kernel = kernel
        self._bytes_per_thread = bytes_per_thread

    def find(
        self, arena: Arena, searches: Sequence[TokenSearch], queries: Tensor, rotated: Tensor, slots: Tensor | None
    ) -> Found:
        """In two calls; see `SearchKernel`. Python's part takes as long as 10,000 sketches: it is kept small."""
        table = np.array([_numbers(search) for search in searches], loops.TOKEN_SEARCH)
        num_rows, width = len(queries), max(search.num_wanted for search in searches)
        of_slots = np.zeros((num_rows, arena.chunk_size), np.float32) if slots is None else slots.numpy()
        asked = (*pages_of(arena), table, queries.numpy())
        num_parts = self._num_parts(searches, arena)
        num_guesses = max([1, *(search.num_scored for search in searches if search.bits is not None)])
        lacking = np.zeros(sum(len(search.pages) for search in searches), np.bool_)
        kept = (
            *_lists(num_rows, num_parts, num_guesses),
            *_lists(num_rows, num_parts, width),
            *_bounds(sum(len(search.pages) * search.num_queries for search in searches), arena.chunk_size),
            *(lacking, np.zeros((num_rows, num_parts), np.bool_)),
        )
        turned = rotated.numpy()
        self._kernel.together(
            [partial(loops.collect, *asked, turned, SPREAD * ERROR, of_slots, part, *kept) for part in range(num_parts)]
        )
        score, position = np.full((num_rows, width), -np.inf, np.float32), np.full((num_rows, width), -1)
        num_helped = max(1, min(self._kernel.num_threads, num_rows // ROWS_PER_THREAD))
        cuts = [num_rows * part // num_helped for part in range(num_helped + 1)]
        self._kernel.together(
            [
                partial(loops.finish, *asked, of_slots, *kept, begin, end, score, position)
                for begin, end in pairwise(cuts)
            ]
        )
        return Found(torch.from_numpy(position), torch.from_numpy(score), _lacking(lacking, searches))

    def _num_parts(self, searches: Sequence[TokenSearch], arena: Arena) -> int:
        """Cores that the chunks are shared out over."""
        token_bytes = arena.dim * arena.dtype.itemsize
        work = sum(
            len(search.pages) * search.num_queries * (token_bytes if search.bits is None else arena.dim // 8)
            for search in searches
        )
        return max(1, min(self._kernel.num_threads, work * arena.chunk_size // self._bytes_per_thread))


def _lacking(flags: Array, searches: Sequence[TokenSearch]) -> list[Tensor]:
    """For each search the chunks of its `flags`."""
    if not flags.any():  # nearly always
        return [torch.empty(0, dtype=torch.int64)] * len(searches)
    found, first = [], 0
    for search in searches:
        own = flags[slice(first, first := first + len(search.pages))]
        found.append(torch.from_numpy(np.flatnonzero(own) + search.first))
    return found


def _lists(num_rows: int, num_parts: int, num: int) -> tuple[Array, Array]:
    """Scores [R, P, N] and tokens, none yet."""
    shape = (num_rows, num_parts, num)
    return np.full(shape, -np.inf, np.float32), np.full(shape, -1)


def _bounds(num: int, chunk_size: int) -> tuple[Array, Array]:
    """What tokens [T, C] may score, not set, and the greatest of each chunk [T]."""
    return np.empty((num, chunk_size), np.float32), np.full(num, -np.inf, np.float32)


def _numbers(search: TokenSearch) -> tuple[int, ...]:
    """As loops take it."""
    mask = search.token_mask
    return (
        *map(_address, (search.keys, search.pages, search.bits, search.factors)),
        0 if mask is None else _address(mask) - search.start,  # as if it began at position 0
        _address(search.known),
        *(len(search.pages), search.first, search.start, search.stop),
        *(search.num_queries, search.num_wanted, search.num_scored),
    )


def _address(tensor: Tensor | None) -> int:
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()
