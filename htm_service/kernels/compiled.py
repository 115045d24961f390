"""The read path on a CPU, compiled: a whole batch in one call per core, which holds no interpreter lock.

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
from functools import partial

import numpy as np
import torch
from torch import Tensor

from htm_service.kernels import loops
from htm_service.kernels.base import Attended, Batch, Projections, Search, View, answer_in_steps
from htm_service.kernels.compilation import compile_all
from htm_service.kernels.loops import Array
from htm_service.memory.arena import Arena

_ENCODINGS = {
    torch.float32: loops.FLOAT32,
    torch.bfloat16: loops.BFLOAT16,
    torch.float16: loops.FLOAT16,
}


ROWS_PER_THREAD = 3
"""A batch is shared out in parts of at least this many rows: fewer are no tile of `loops.dots`, and two parts of two
rows take longer than one of four."""
PRODUCTS_PER_THREAD = 1 << 21
"""Of keys with queries; as many multiply-adds as one query does with 8 MiB of keys."""


class CompiledKernel:
    """See the head of this module. `num_threads` share a large batch, the caller's thread being one of them.

    Keys are shared out in parts of at least `products_per_thread` multiply-adds with queries.
    """

    name = "compiled"

    def __init__(self, num_threads: int | None = None, products_per_thread: int = PRODUCTS_PER_THREAD) -> None:
        self.num_threads = num_threads or _num_cores()
        self.products_per_thread = products_per_thread
        self._helpers = ThreadPoolExecutor(max(1, self.num_threads - 1), "htm-kernel")

    def warm_up(self) -> None:
        """Compile now rather than with the first batch; from numba's cache on disk, where it can write one."""
        logging.getLogger(__name__).info("the kernel is made ready; where it is not kept it is compiled, in about 20 s")
        compile_all()

    def fold(self, projections: Projections, queries: Tensor) -> tuple[Tensor, Tensor]:
        """In one call; see `Kernel`."""
        num_heads, _, dim = projections.key.shape
        summary = np.empty((len(queries), dim), np.float32)
        heads = np.empty((len(queries), num_heads, dim), np.float32)
        rows, weights = queries.contiguous().numpy(), [tensor.numpy() for tensor in projections[:5]]
        self.together(
            [
                partial(loops.fold, rows[part], *weights, summary[part], heads[part])
                for part in _row_parts(len(queries), self._num_parts(len(queries)))
            ]
        )
        return torch.from_numpy(summary), torch.from_numpy(heads)

    def project(self, projections: Projections, z: Tensor) -> Tensor:
        """In one call; see `Kernel`."""
        output = np.empty((len(z), z.shape[2]), np.float32)
        rows, weights = z.numpy(), [tensor.numpy() for tensor in projections[5:]]
        self.together(
            [
                partial(loops.project, rows[part], *weights, output[part])
                for part in _row_parts(len(z), self._num_parts(len(z)))
            ]
        )
        return torch.from_numpy(output)

    def select(self, batch: Batch) -> Tensor:
        """In two calls; see `Kernel`."""
        table = _table(batch.view.searches)
        index, logit = self._score(batch, table)
        chosen = np.full((len(batch.summary), batch.view.width), -1)
        loops.choose(table, index, logit, chosen, np.zeros(chosen.shape, np.float32))
        return torch.from_numpy(chosen)

    def attend(self, batch: Batch) -> Attended:
        """In one call, or two where a session is long: first its keys, shared out, then the rows; see `Attended`."""
        view = batch.view
        table, pages, positions = _table(view.searches), pages_of(view.arena), _positions(view)
        taken = _nothing_taken(view, len(batch.summary), batch.heads.shape[1])
        summary, heads = batch.summary.numpy(), batch.heads.numpy()
        if self._is_long(table, view.arena):
            found, logit = self._score(batch, table)
            self._by_rows(
                table,
                view.arena.dim,
                lambda rows, searches: loops.attend(
                    *pages, searches, found[rows], logit[rows], heads[rows], positions, *_of(rows, taken)
                ),
            )
        else:
            self._by_rows(
                table,
                view.arena.dim,
                lambda rows, searches: loops.read(
                    *pages, searches, summary[rows], heads[rows], positions, *_of(rows, taken)
                ),
            )
        return _attended(view, taken)

    def answer(self, projections: Projections, queries: Tensor, view: View) -> tuple[Attended, Tensor]:
        """In one call, or in steps where a session is long; see `Kernel`."""
        table = _table(view.searches)
        if self._is_long(table, view.arena):
            return answer_in_steps(self, projections, queries, view)
        pages, positions = pages_of(view.arena), _positions(view)
        taken = _nothing_taken(view, len(queries), len(projections.key))
        questions, weights = queries.contiguous().numpy(), [tensor.numpy() for tensor in projections]
        output = np.zeros(queries.shape, np.float32)
        self._by_rows(
            table,
            view.arena.dim,
            lambda rows, searches: loops.answer(
                *(questions[rows], *weights, *pages, searches, positions),
                *(*_of(rows, taken), output[rows]),
            ),
        )
        return _attended(view, taken), torch.from_numpy(output)

    def _is_long(self, table: Array, arena: Arena) -> bool:
        """Whether a search has so many keys that two cores should share them."""
        return self.num_threads > 1 and int(table["num_keys"].max()) * arena.dim >= 2 * self.products_per_thread

    def _score(self, batch: Batch, table: Array) -> tuple[Array, Array]:
        """The best keys and their logits, [R, P, K] each, of P parts of every search's keys.

        Many keys are scored on several cores, whether they are of one long session or of many.
        """
        num_products = int(table["num_keys"] @ table["num_queries"]) * batch.view.arena.dim
        num_parts = max(1, min(self.num_threads, num_products // self.products_per_thread))
        index = np.full((len(batch.summary), num_parts, batch.view.width), -1)
        logit = np.full(index.shape, -np.inf, np.float32)
        summary = batch.summary.numpy()
        self.together([partial(loops.score, table, summary, part, index, logit) for part in range(num_parts)])
        return index, logit

    def _by_rows(self, table: Array, dim: int, call: Callable[[slice, Array], None]) -> None:
        """Call for parts of the rows, with the searches [s] SEARCH of these, on several cores when they are many."""
        num_rows = int(table["num_queries"].sum())
        self.together([partial(call, *part) for part in _share_out(table, num_rows, self._num_parts(num_rows), dim)])

    def _num_parts(self, num_rows: int) -> int:
        return max(1, min(self.num_threads, num_rows // ROWS_PER_THREAD))

    def together(self, calls: Sequence[Callable[[], None]]) -> None:
        """Make all the calls at once, the first on this thread."""
        helped = [self._helpers.submit(call) for call in calls[1:]]
        calls[0]()
        for call in helped:
            call.result()


def pages_of(arena: Arena) -> tuple[Array, Array, int]:
    """All pages [P, C, D] as the loops take them: float32, or the bits of narrower numbers; and which these are."""
    contents, none = arena.contents, (0, arena.chunk_size, arena.dim)
    assert contents is not None, "this kernel runs on a CPU"
    encoding = _ENCODINGS[contents.dtype]
    if encoding == loops.FLOAT32:
        return contents.numpy(), np.empty(none, np.uint16), encoding
    return np.empty(none, np.float32), contents.view(torch.uint16).numpy(), encoding


def _positions(view: View) -> Array:
    """[C, D], or [0, D] for none."""
    return np.empty((0, view.arena.dim), np.float32) if view.positions is None else view.positions.numpy()


def _nothing_taken(view: View, num_rows: int, num_heads: int) -> tuple[Array, ...]:
    """The fields of `Attended` for the loops to write into, those about tokens empty where they are not asked for.

    Arrays, not tensors, because each of torch's calls gives the interpreter's lock away.
    """
    size, taken = view.arena.chunk_size, (num_rows, view.width)
    listed = (*taken, size) if view.tokens else (0, size, size)
    return (
        np.full(taken, -1),
        np.zeros(taken, np.float32),
        np.zeros((num_rows, num_heads, view.arena.dim), np.float32),
        np.zeros(listed, np.float32),
        np.full(listed, -np.inf, np.float32),
    )


def _of(rows: slice, fields: tuple[Array, ...]) -> list[Array]:
    """Where the loops write what these rows take."""
    return [field[rows] for field in fields]


def _attended(view: View, fields: tuple[Array, ...]) -> Attended:
    """What the loops wrote."""
    *taken, token_weight, token_score = map(torch.from_numpy, fields)
    return Attended(*taken, *((token_weight, token_score) if view.tokens else (None, None)))


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_out(table: Array, num_rows: int, num_parts: int, dim: int) -> list[tuple[slice, Array]]:
    """Parts of about equally many rows, each with the searches [s] SEARCH of its rows; a search may be cut in two."""
    stops = np.cumsum(table["num_queries"])
    starts = stops - table["num_queries"]
    parts = []
    for rows in _row_parts(num_rows, num_parts):
        inside = (starts < rows.stop) & (stops > rows.start)
        start, stop = np.maximum(starts[inside], rows.start), np.minimum(stops[inside], rows.stop)
        searches = table[inside]  # a copy
        num_before = start - starts[inside]
        searches["hidden"] += num_before * searches["hidden_stride"]
        has_ends = searches["ends"] != 0
        searches["ends"] += num_before * has_ends * 3 * 8
        searches["own_keys"] += num_before * has_ends * dim * 4
        searches["num_queries"] = stop - start
        parts.append((rows, searches))
    return parts


def _row_parts(num_rows: int, num_parts: int) -> list[slice]:
    """All rows in parts of about the same size."""
    return [slice(num_rows * part // num_parts, num_rows * (part + 1) // num_parts) for part in range(num_parts)]


def _table(searches: Sequence[Search]) -> Array:
    """Searches as the loops take them: [S] SEARCH."""
    return np.array([search.numbers() for search in searches], loops.SEARCH)
