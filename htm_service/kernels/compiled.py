"""The read path on a CPU, compiled: a whole batch in three calls that hold no interpreter lock.

In torch a batch is dozens of calls, and after every one the device's thread has to take the interpreter's lock back
from the event loop, which meanwhile has work of its own. Here numba compiles the loops, and nothing is handed over
between. Keys and contents are read in place, once; nothing is gathered.
Does not know sessions, requests or models. Needs numba; `resolve.py` falls back where it is not there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from htm_service.arena import Arena, Budget
from htm_service.kernels import loops
from htm_service.kernels.base import Attended, Batch, Projections, Search

_ENCODINGS = {
    torch.float32: loops.FLOAT32,
    torch.bfloat16: loops.BFLOAT16,
    torch.float16: loops.FLOAT16,
}


ROWS_PER_THREAD = 8
"""A batch is shared out in parts of at least this many rows: fewer are not worth waking another thread for."""


class CompiledKernel:
    """See the head of this module. `num_threads` share a large batch, the caller's thread being one of them."""

    name = "compiled"

    def __init__(self, num_threads: int | None = None) -> None:
        self.num_threads = num_threads or _num_cores()
        self._helpers = ThreadPoolExecutor(max(1, self.num_threads - 1), "htm-kernel")

    def warm_up(self) -> None:
        """Compile now rather than with the first batch; from numba's cache on disk, where it can write one."""
        log = logging.getLogger(__name__)
        log.info("the kernel is made ready; the first time it is compiled, which takes about 15 s")
        arena = Arena(1, 1, torch.float32, torch.device("cpu"), Budget(64))
        search = Search(torch.zeros(1, 1), torch.tensor(arena.allocate(1)), 0, 0, 0, 1, 1)
        one, cube = torch.ones(1, 1), torch.ones(1, 1, 1)
        projections = Projections(one, one[0], one, one[0], cube, cube, one, one[0])
        summary, heads = self.fold(projections, one)
        self.project(projections, self.attend(Batch(arena, summary, heads, None, [search])).z)

    def fold(self, projections: Projections, queries: Tensor) -> tuple[Tensor, Tensor]:
        """In one call; see `Kernel`."""
        num_heads, _, dim = projections.key.shape
        summary = np.empty((len(queries), dim), np.float32)
        heads = np.empty((len(queries), num_heads, dim), np.float32)
        rows, weights = queries.contiguous().numpy(), [tensor.numpy() for tensor in projections[:5]]
        self._together(
            [
                partial(loops.fold, rows[part], *weights, summary[part], heads[part])
                for part in self._row_parts(len(queries))
            ]
        )
        return torch.from_numpy(summary), torch.from_numpy(heads)

    def project(self, projections: Projections, z: Tensor) -> Tensor:
        """In one call; see `Kernel`."""
        output = np.empty((len(z), z.shape[2]), np.float32)
        rows, weights = z.numpy(), [tensor.numpy() for tensor in projections[5:]]
        self._together([partial(loops.project, rows[part], *weights, output[part]) for part in self._row_parts(len(z))])
        return torch.from_numpy(output)

    def attend(self, batch: Batch) -> Attended:
        """All rows in one call; see `Attended`."""
        contents = batch.arena.contents
        assert contents is not None, "this kernel runs on a CPU"
        # Arrays, not tensors, because each of torch's calls gives the interpreter's lock away.
        num_rows, size = len(batch.heads), batch.arena.chunk_size
        wide, narrow = contents, torch.empty(0, size, batch.arena.dim, dtype=torch.uint16)
        if contents.dtype != torch.float32:
            wide, narrow = torch.empty(0, size, batch.arena.dim), contents.view(torch.uint16)
        listed = (num_rows, batch.width, size) if batch.tokens else (0, size, size)
        index = np.full((num_rows, batch.width), -1)
        weight = np.zeros(index.shape, np.float32)
        z = np.zeros(batch.heads.shape, np.float32)
        token_weight = np.zeros(listed, np.float32)
        token_score = np.full(listed, -np.inf, np.float32)
        positions = np.empty((0, batch.arena.dim), np.float32) if batch.positions is None else batch.positions.numpy()
        rows = (batch.summary.numpy(), batch.heads.numpy(), index, weight, z, token_weight, token_score)

        def attend_part(first: int, searches: list[Search]) -> None:
            table = np.array([_addresses(search) for search in searches], loops.SEARCH)
            stop = first + sum(search.num_queries for search in searches)
            summary, heads, *written = (array[first:stop] for array in rows)
            loops.attend(
                wide.numpy(), narrow.numpy(), _ENCODINGS[contents.dtype], table, summary, heads, positions, *written
            )

        parts = _share_out(batch.searches, num_rows, self._num_parts(num_rows))
        self._together([partial(attend_part, *part) for part in parts])
        return Attended(
            torch.from_numpy(index),
            torch.from_numpy(weight),
            torch.from_numpy(z),
            torch.from_numpy(token_weight) if batch.tokens else None,
            torch.from_numpy(token_score) if batch.tokens else None,
        )

    def _num_parts(self, num_rows: int) -> int:
        return max(1, min(self.num_threads, num_rows // ROWS_PER_THREAD))

    def _row_parts(self, num_rows: int) -> list[slice]:
        """All rows in parts of about the same size."""
        num_parts = self._num_parts(num_rows)
        return [slice(num_rows * part // num_parts, num_rows * (part + 1) // num_parts) for part in range(num_parts)]

    def _together(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make all the calls at once, the first on this thread."""
        helped = [self._helpers.submit(call) for call in calls[1:]]
        calls[0]()
        for call in helped:
            call.result()


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_out(searches: Sequence[Search], num_rows: int, num_parts: int) -> list[tuple[int, list[Search]]]:
    """Parts of about equally many rows, each with its first row; a search may be cut in two."""
    parts: list[tuple[int, list[Search]]] = [(0, [])]
    row = 0
    for search in searches:
        done = 0
        while done < search.num_queries:
            if row >= num_rows * len(parts) // num_parts:
                parts.append((row, []))
            taken = min(search.num_queries - done, num_rows * len(parts) // num_parts - row)
            hidden = search.hidden
            if hidden is not None and hidden.ndim == 2:
                hidden = hidden[done : done + taken]
            parts[-1][1].append(replace(search, num_queries=taken, hidden=hidden) if num_parts > 1 else search)
            done, row = done + taken, row + taken
    return parts


def _addresses(search: Search) -> tuple[int, ...]:
    """A search as the loops take it."""
    return (
        _address(search.keys),
        _address(search.pages),
        _address(search.token_mask),
        _address(search.hidden),
        int(search.hidden is not None and search.hidden.ndim == 2),
        len(search.keys),
        search.first,
        search.start,
        search.stop,
        search.num_queries,
        search.k,
    )


def _address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers are, 0 for none."""
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()
