"""The read path on a GPU, in Triton: a batch is one small copy to the device and four launches, whatever is in it.

The host plans from what it knows without asking the device: lengths, addresses, k. The plan is one int64 table, copied
from pinned memory; nothing here waits for the device, so the caller goes on while it works. All of it is ordered by the
stream: memory that a batch reads may be given back as soon as the call returns.
`fold` and `project` are matrix products, which cuBLAS does best: they are the reference's.
On a CPU this runs in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before triton is imported.
Does not know sessions, requests or models. Device code: `triton_loops.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from htm_service.kernels import triton_loops as loops
from htm_service.kernels.base import Attended, Batch, Search, View
from htm_service.kernels.reference import MOST, ReferenceKernel, mean_over_heads
from htm_service.memory.arena import Arena, Budget

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MIN_PIECE = 128
"""Keys that one program scores, at least; at most 256, the greatest k."""
FEW_ROWS, MANY_ROWS = 4, 16
"""Rows of a search that share a reading of its keys; more of them find the keys in the device's cache."""
CANDIDATES = 1024
"""How many a row merges at once."""
HEADS_AT_ONCE, SLOTS_AT_ONCE, COLUMNS_AT_ONCE = 16, 32, 64
"""Of tokens and heads, at most."""


class TritonKernel(ReferenceKernel):
    """See the head of this module."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def warm_up(self) -> None:
        """Compile what usual shapes take; from Triton's cache on disk after the first time."""
        for dtype in _DTYPES:
            arena = Arena(64, 32, dtype, self._device, Budget(16 << 20))
            pages = torch.tensor(arena.allocate(1)).to(self._device)
            tokens = torch.zeros(32, 64, device=self._device)
            for num_rows, num_heads, positions in ((1, 1, None), (FEW_ROWS + 1, 8, tokens)):
                search = Search(tokens[:1], pages, 0, 0, 1, num_rows, 1)
                heads = torch.zeros(num_rows, num_heads, 64, device=self._device)
                self.attend(Batch(View(arena, positions, [search]), heads[:, 0], heads))

    def select(self, batch: Batch) -> Tensor:
        """Two launches; see `Kernel`."""
        with torch.cuda.device_of(batch.summary):
            return _choose(batch, _plan(batch.view)).chunks

    def attend(self, batch: Batch) -> Attended:
        """Four launches and a softmax; see `Attended`."""
        view, arena, heads_of_rows = batch.view, batch.view.arena, batch.heads.contiguous()
        num_rows, num_heads, _ = heads_of_rows.shape
        sizes = (view.width, num_heads, arena.dim, arena.chunk_size)
        slots = max(16, min(SLOTS_AT_ONCE, triton.next_power_of_2(arena.chunk_size)))
        heads = min(HEADS_AT_ONCE, triton.next_power_of_2(num_heads))
        slot_blocks, head_blocks = triton.cdiv(arena.chunk_size, slots), triton.cdiv(num_heads, heads)
        tiles: dict[str, Any] = {"HEADS": heads, "SLOTS": slots, "BLOCK": COLUMNS_AT_ONCE}
        encoding = {"DTYPE": _DTYPES[arena.dtype], "ALIGNMENT": _alignment(arena.dim)}
        logits = heads_of_rows.new_empty(num_rows, view.width, num_heads, arena.chunk_size)
        z = torch.empty_like(heads_of_rows)
        with torch.cuda.device_of(batch.summary):
            plan = _plan(view)
            chosen = _choose(batch, plan)
            loops.score_tokens[(num_rows, view.width * slot_blocks, head_blocks)](
                *(plan.searches, plan.search_of_row, heads_of_rows, view.positions),
                *(chosen.chunks, chosen.contents, logits, *sizes),
                **encoding,
                **tiles,
            )
            shares = logits.softmax(dim=-1)
            loops.add_up[(num_rows, triton.cdiv(arena.dim, COLUMNS_AT_ONCE), head_blocks)](
                *(plan.searches, plan.search_of_row, view.positions),
                *(chosen.chunks, chosen.weights, chosen.contents, shares, z, *sizes),
                **encoding,
                **tiles,
            )
            z.clamp_(-MOST, MOST)
        if not view.tokens:
            return Attended(chosen.chunks, chosen.weights, z, None, None)
        shares = shares.masked_fill(logits == -torch.inf, 0.0)  # chunks without a visible token: 0 / 0
        return Attended(chosen.chunks, chosen.weights, z, shares.mean(dim=2), mean_over_heads(logits, dim=2))


class _Plan(NamedTuple):
    """A batch as the device takes it, all int64; see `triton_loops.py`."""

    searches: Tensor
    search_of_row: Tensor
    tiles: Tensor
    slabs: Tensor
    num_lists: int


class _Chosen(NamedTuple):
    """The chunks of each row, [R, K]: their indexes, weights, and the addresses of their contents, 0 for none."""

    chunks: Tensor
    weights: Tensor
    contents: Tensor


def _choose(batch: Batch, plan: _Plan) -> _Chosen:
    """Score the keys and take the best chunks."""
    arena, summary, width = batch.view.arena, batch.summary.contiguous(), batch.view.width
    num_listed = _list_size(width)
    piece = _piece_size(width)
    lists = plan.searches.new_empty(plan.num_lists, num_listed)
    loops.score_keys[(len(plan.tiles),)](
        *(plan.searches, plan.tiles, summary, lists, arena.dim),
        ALIGNMENT=_alignment(arena.dim),
        ROWS=_rows_at_once(batch.view),
        PIECE=piece,
        LIST=num_listed,
        BLOCK=32,
    )
    chunks = plan.searches.new_empty(len(summary), width)
    chosen = _Chosen(chunks, summary.new_empty(chunks.shape), torch.empty_like(chunks))
    loops.choose[(len(summary),)](
        *(plan.searches, plan.search_of_row, plan.slabs, lists, *chosen),
        *(width, arena.slab_pages, arena.page_bytes),
        PIECE=piece,
        LIST=num_listed,
        CANDIDATES=CANDIDATES,
    )
    return chosen


def _plan(view: View) -> _Plan:
    """All that the device must know, in one copy that the host does not wait for."""
    table = np.array([(*search.numbers(), 0, 0) for search in view.searches], np.int64)
    num_rows, num_keys = table[:, loops.NUM_ROWS.value], table[:, loops.NUM_KEYS.value]
    num_pieces = -(-num_keys // _piece_size(view.width))
    table[:, loops.FIRST_ROW.value] = _starts(num_rows)
    table[:, loops.FIRST_LIST.value] = _starts(num_rows * num_pieces)
    numbers = np.arange(len(table))
    num_tiles = -(-num_rows // _rows_at_once(view)) * num_pieces
    search_of_tile = np.repeat(numbers, num_tiles)
    number_of_tile = np.arange(len(search_of_tile)) - _starts(num_tiles)[search_of_tile]
    parts = (
        table,
        np.repeat(numbers, num_rows),
        np.stack((search_of_tile, number_of_tile), axis=1),
        np.array(view.arena.slab_addresses, np.int64),
    )
    # Each begins at a multiple of 16 bytes, which Triton compiles for.
    padded = [np.pad(part.ravel(), (0, part.size % 2)) for part in parts]
    device = view.arena.device
    pinned = torch.empty(sum(map(len, padded)), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(padded, out=pinned.numpy())
    pieces = pinned.to(device, non_blocking=True).split([len(part) for part in padded])
    searches, search_of_row, tiles, slabs = (
        piece[: part.size].view(part.shape) for piece, part in zip(pieces, parts, strict=True)
    )
    return _Plan(searches, search_of_row, tiles, slabs, int((num_rows * num_pieces).sum()))


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of some runs begins that follow each other."""
    return np.cumsum(counts) - counts


def _list_size(width: int) -> int:
    """Candidates that a row keeps: K, padded; not fewer than 8, so that few variants are compiled."""
    return max(8, int(triton.next_power_of_2(width)))


def _piece_size(width: int) -> int:
    return max(MIN_PIECE, _list_size(width))


def _rows_at_once(view: View) -> int:
    """Few where that is all there are, or where long lists take the registers."""
    most = max(search.num_queries for search in view.searches)
    return FEW_ROWS if most <= FEW_ROWS or _list_size(view.width) > 64 else MANY_ROWS


def _alignment(dim: int) -> int:
    """Bytes that rows of `dim` numbers are surely aligned to, in any dtype, where the first one is."""
    return 16 if dim % 16 == 0 else 2
