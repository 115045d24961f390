"""The read path on a CPU, compiled: all rows of a batch in one call that holds no interpreter lock.

`BlockedKernel` spends a dozen calls into torch on every row, each of which takes the interpreter's lock again from
the event loop. Here numba compiles the loops over rows, chunks, slots and heads, and the loop goes on answering
meanwhile. Contents are read in place, once, page by page; nothing is gathered or allocated per row.
Shapes: R rows, D width, H heads, C chunk size, K selected chunks per row, P pages.
Does not know sessions, requests or models. Needs numba; `resolve.py` falls back where it is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from htm_service.kernels.base import ChunkAttention, ChunkBatch
from htm_service.kernels.blocked import BlockedKernel

Array = npt.NDArray[Any]


class CompiledKernel(BlockedKernel):
    """Scoring and selection of the blocked kernel, chunk attention compiled for float32 contents.

    Contents of another dtype, which numba cannot read, go the blocked kernel's way.
    """

    name = "compiled"

    def warm_up(self) -> None:
        """Compile now rather than with the first batch; from numba's cache on disk, where it can write one."""
        _attend_rows()

    def attend_chunks(self, batch: ChunkBatch, *, tokens: bool) -> ChunkAttention:
        """All rows in one call; see `ChunkAttention`."""
        contents = batch.arena.contents
        if contents is None or contents.dtype != torch.float32:
            return super().attend_chunks(batch, tokens=tokens)
        num_rows, num_chunks, size = batch.visible.shape
        num_heads = batch.heads.shape[1]
        z = torch.zeros_like(batch.heads)
        by_slot = batch.heads.new_zeros(num_rows, num_heads, size)
        if batch.positions is None:
            position_logits = by_slot.new_zeros(by_slot.shape)
        else:
            position_logits = batch.heads @ batch.positions.T
        listed = (num_rows, num_chunks, size) if tokens else (0, 0, 0)
        token_weights = batch.weights.new_zeros(listed)
        token_scores = batch.weights.new_full(listed, -torch.inf)
        _attend_rows()(
            *(
                tensor.contiguous().numpy()
                for tensor in (contents, batch.pages, batch.visible, batch.weights, batch.heads, position_logits)
            ),
            *(tensor.numpy() for tensor in (z, by_slot, token_weights, token_scores)),
            tokens,
        )
        if batch.positions is not None:
            z += by_slot @ batch.positions
        return ChunkAttention(z, token_weights if tokens else None, token_scores if tokens else None)


@cache
def _attend_rows() -> Callable[..., None]:
    """The compiled loops; compiled by the first call, because nothing happens at import."""
    floats3, floats2 = numba.float32[:, :, ::1], numba.float32[:, ::1]
    signature = numba.void(
        floats3, numba.int64[:, ::1], numba.boolean[:, :, ::1], floats2, floats3, floats3,
        floats3, floats3, floats3, floats3, numba.boolean,
    )  # fmt: skip
    # Sums may be reordered, or they could not be vectorised; NaN and infinity must stay what they are.
    compile_loops = partial(numba.njit, signature, nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
    compiled: Callable[..., None]
    try:
        compiled = compile_loops(cache=True)(_loops)
    except RuntimeError:  # no folder that numba could write its cache to, as in a read-only container
        compiled = compile_loops()(_loops)
    return compiled


def _loops(
    contents: Array,  # [P, C, D]
    pages: Array,  # [R, K]
    visible: Array,  # [R, K, C]
    weights: Array,  # [R, K]
    heads: Array,  # [R, H, D]
    position_logits: Array,  # [R, H, C]
    z: Array,  # [R, H, D], zeros; written
    by_slot: Array,  # [R, H, C], zeros; written: weights summed over chunks
    token_weights: Array,  # [R, K, C] or empty, zeros; written
    token_scores: Array,  # [R, K, C] or empty, -inf; written
    tokens: bool,
) -> None:
    num_rows, num_heads, dim = heads.shape
    num_chunks, size = visible.shape[1], visible.shape[2]
    share = np.empty((num_heads, size), np.float32)
    for r in range(num_rows):
        for k in range(num_chunks):
            page = contents[pages[r, k]]
            for c in range(size):
                if visible[r, k, c]:
                    mean = np.float32(0)
                    for h in range(num_heads):
                        logit = position_logits[r, h, c]
                        for d in range(dim):
                            logit += heads[r, h, d] * page[c, d]
                        share[h, c] = logit
                        mean += logit
                    if tokens:
                        token_scores[r, k, c] = mean / np.float32(num_heads)
            for h in range(num_heads):
                greatest = np.float32(-np.inf)
                for c in range(size):
                    if visible[r, k, c] and not share[h, c] <= greatest:  # a NaN becomes the greatest, and stays
                        greatest = share[h, c]
                total = np.float32(0)
                for c in range(size):
                    if visible[r, k, c]:
                        share[h, c] = np.exp(share[h, c] - greatest)
                        total += share[h, c]
                for c in range(size):
                    if visible[r, k, c]:
                        part = share[h, c] / total
                        if tokens:
                            token_weights[r, k, c] += part / np.float32(num_heads)
                        share[h, c] = part * weights[r, k]
                        by_slot[r, h, c] += share[h, c]
            for c in range(size):
                if visible[r, k, c]:
                    for h in range(num_heads):
                        part = share[h, c]
                        for d in range(dim):
                            z[r, h, d] += part * page[c, d]
