"""The read path: a batch of attends over many sessions, from queries to attended vectors.

Shapes: R rows (all queries of a group), Q queries of one read, D width, H heads, C chunk size, M chunks,
K selected chunks.
For each group of reads that share a model and an arena: fold the queries, score each session's keys, select,
attend in the chunks of all rows together, project. Everything else about a request is decided before
(engine) or after (recalls). Does not know: queues, storage, payloads, times of day.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from htm_service.arena import Arena
from htm_service.errors import HTMError, InvalidArgument
from htm_service.kernels import ChunkAttention, ChunkBatch, Kernel
from htm_service.memory import Memory
from htm_service.models import FoldedQueries, Model
from htm_service.records import AttendRequest, AttendResult, Floats, Ints, Recalled
from htm_service.visibility import Visibility, partial_keys


@dataclass(frozen=True, slots=True)
class Read:
    """One attend, ready to run: `request.queries` is [Q, D], checked; `top_k` is resolved."""

    memory: Memory
    model: Model
    request: AttendRequest
    visibility: Visibility
    top_k: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The chunks one read selected: `index` [Q, k] int64, `logits` [Q, k], -inf where none was left."""

    index: Tensor
    logits: Tensor


class Reader:
    """Runs batches of reads with one kernel, on one thread."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, reads: Sequence[Read]) -> list[AttendResult | Exception]:
        """One result per read, in order; a read that fails by itself gets its own error."""
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, read in enumerate(reads):
            groups[id(read.model), id(read.memory.arena)].append(place)
        results: dict[int, AttendResult | Exception] = {}
        with torch.inference_mode():
            for places in groups.values():
                results.update(zip(places, self._run_group([reads[place] for place in places]), strict=True))
        return [results[place] for place in range(len(reads))]

    def _run_group(self, reads: list[Read]) -> list[AttendResult | Exception]:
        """Fold, score, select, attend, project: the main path."""
        model, arena = reads[0].model, reads[0].memory.arena
        folded = model.fold(_stack_queries(reads, arena.device))
        selections = self._select_all(reads, folded.summary)
        index = _stack([selection.index for selection in selections], -1)  # [R, K]
        logits = _stack([selection.logits for selection in selections], -torch.inf)
        index = index.masked_fill(logits == -torch.inf, -1)
        weights = logits.softmax(dim=-1).masked_fill(index < 0, 0.0)  # a row without any: 0 / 0
        tokens = any(read.request.tokens for read in reads)
        attended = self._attend(reads, model, folded, index, weights, tokens=tokens)
        output = model.project(attended.z, folded, (index >= 0).any(dim=-1))
        return _split(reads, output, index, weights, attended)

    def _select_all(self, reads: list[Read], summary: Tensor) -> list[Selection]:
        """One selection per read; reads that see the same of the same session share one pass over its keys."""
        rows = summary.split([len(read.request.queries) for read in reads])
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, read in enumerate(reads):
            alike[_what_is_seen(read, place)].append(place)
        selections: dict[int, Selection] = {}
        for places in alike.values():
            together = self._select(reads[places[0]], torch.cat([rows[place] for place in places]))
            counts = [len(rows[place]) for place in places]
            parts = zip(places, together.index.split(counts), together.logits.split(counts), strict=True)
            selections.update((place, Selection(index, logits)) for place, index, logits in parts)
        return [selections[place] for place in range(len(reads))]

    def _select(self, read: Read, summary: Tensor) -> Selection:
        """Score the keys of one session against `summary` [Q, D] and take the top-k visible chunks."""
        memory, visibility = read.memory, read.visibility
        first, last = visibility.chunk_range(memory.chunk_size)
        if first == last:
            none = torch.empty(len(summary), 0, device=summary.device)
            return Selection(none.to(torch.int64), none)
        keys = memory.keys[first:last]
        in_part = partial_keys(memory, visibility, first, last)
        if in_part is not None:
            partial, means, _ = in_part
            keys = keys.clone()
            keys[partial - first] = means
        logits = self.kernel.score(keys, summary)  # [Q, m]
        is_finite = logits.isfinite().all(dim=-1, keepdim=True)
        if in_part is not None:
            logits[:, in_part[2] - first] = -torch.inf
        allowed = visibility.allowed(first, last, len(summary))
        if allowed is not None:
            logits.masked_fill_(~torch.tensor(allowed, device=logits.device), -torch.inf)
        best, index = self.kernel.select(logits, min(read.top_k, last - first))
        # An overflow anywhere among the logits makes the row's weights, and so its output, NaN: `_split` tells.
        return Selection(index + first, best.masked_fill(~is_finite, torch.nan))

    def _attend(
        self,
        reads: list[Read],
        model: Model,
        folded: FoldedQueries,
        index: Tensor,
        weights: Tensor,
        *,
        tokens: bool,
    ) -> ChunkAttention:
        """Attend in the chunks `index` [R, K] of all rows, -1 meaning none."""
        arena: Arena = reads[0].memory.arena
        counts = [len(read.request.queries) for read in reads]
        pages = [_pages_of(read.memory, rows) for read, rows in zip(reads, index.split(counts), strict=True)]
        page_ids = torch.cat(pages)
        some = page_ids[page_ids >= 0]
        if not len(some) or not index.shape[1]:
            shape = (*index.shape, arena.chunk_size)
            empty = weights.new_zeros(shape) if tokens else None
            return ChunkAttention(torch.zeros_like(folded.heads), empty, empty)
        # A row of an empty session has no page of its own; any page will do, nothing of it is visible.
        page_ids = page_ids.where(page_ids >= 0, some[0])
        positions = model.positions(arena.chunk_size)
        visible = _visible_slots(reads, index, counts, arena.chunk_size)
        batch = ChunkBatch(arena, page_ids, visible, weights, folded.heads, positions)
        return self.kernel.attend_chunks(batch, tokens=tokens)


def _what_is_seen(read: Read, place: int) -> tuple[int, ...]:
    """Equal for reads that can share a selection; masks are not compared, such a read stays alone."""
    visibility = read.visibility
    if visibility.token_mask is not None or visibility.chunk_mask is not None:
        return (place,)
    return id(read.memory), visibility.start, visibility.stop, read.top_k


def _pages_of(memory: Memory, index: Tensor) -> Tensor:
    """Page ids [Q, K] of chunks [Q, K], -1 all over for an empty session."""
    if not memory.num_chunks:
        return torch.full_like(index, -1)
    return memory.page_table[index.clamp(min=0)]


def _visible_slots(reads: list[Read], index: Tensor, counts: list[int], chunk_size: int) -> Tensor:
    """Visible slots [R, K, C] of the selected chunks [R, K]; ranges for all rows at once, masks read by read."""
    repeats = torch.tensor(counts)
    starts, stops = (
        torch.tensor(bounds).repeat_interleave(repeats).to(index.device)[:, None, None]
        for bounds in ([read.visibility.start for read in reads], [read.visibility.stop for read in reads])
    )
    positions = index[..., None] * chunk_size + torch.arange(chunk_size, device=index.device)
    visible = (positions >= starts) & (positions < stops) & (index >= 0)[..., None]
    first = 0
    for read, count in zip(reads, counts, strict=True):
        if read.visibility.token_mask is not None:
            rows = slice(first, first + count)
            visible[rows] &= read.visibility.slots(index[rows].clamp(min=0), chunk_size)
        first += count
    return visible


def _stack_queries(reads: list[Read], device: torch.device) -> Tensor:
    """All queries [R, D] float32 on the device."""
    return torch.from_numpy(np.concatenate([read.request.queries for read in reads])).to(device)


def _stack(parts: list[Tensor], fill: float) -> Tensor:
    """Rows of different widths k as one tensor [R, max k], filled up at the right."""
    width = max(part.shape[1] for part in parts)
    if all(part.shape[1] == width for part in parts):
        return torch.cat(parts)
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
    return torch.cat(padded)


def _split(
    reads: list[Read], output: Tensor, index: Tensor, weights: Tensor, attended: ChunkAttention
) -> list[AttendResult | Exception]:
    """Cut the group's tensors into one result per read, on the host."""
    outputs, indexes, chunk_weights = output.cpu().numpy(), index.cpu().numpy(), weights.cpu().numpy()
    is_finite = np.isfinite(outputs).all(axis=1)
    listed = attended.token_weights is not None and attended.token_scores is not None
    token_weights = attended.token_weights.cpu().numpy() if attended.token_weights is not None else None
    token_scores = attended.token_scores.cpu().numpy() if attended.token_scores is not None else None
    results: list[AttendResult | Exception] = []
    stop = 0
    for read in reads:
        rows = slice(stop, stop := stop + len(read.request.queries))
        if not is_finite[rows].all():
            results.append(_overflow(read))
            continue
        width = min(read.top_k, read.memory.num_chunks)
        recalled: list[list[Recalled]] | None = None
        if read.request.tokens and listed and token_weights is not None and token_scores is not None:
            recalled = [
                _rank(read, *row)
                for row in zip(indexes[rows], chunk_weights[rows], token_weights[rows], token_scores[rows], strict=True)
            ]
        index_of, weight_of = indexes[rows, :width].copy(), chunk_weights[rows, :width].copy()
        results.append(AttendResult(outputs[rows].copy(), index_of, weight_of, recalled, read.memory.length))
    return results


def _rank(read: Read, index: Ints, weight: Floats, shares: Floats, scores: Floats) -> list[Recalled]:
    """The recalled tokens of one query in the order asked for, best first, ties to the lower position."""
    size = read.memory.chunk_size
    positions = rearrange(index[:, None] * size + np.arange(size), "k c -> (k c)")
    token_weights = (weight[:, None] * shares).ravel()
    token_scores = scores.ravel()
    seen = np.flatnonzero((token_scores > -np.inf) & (index >= 0).repeat(size))
    by = token_weights if read.request.rank_by == "weight" else token_scores
    best = seen[np.lexsort((positions[seen], -by[seen]))][: read.request.max_recalled]
    return [
        Recalled(int(positions[i]), float(token_weights[i]), float(token_scores[i]), int(positions[i]) // size)
        for i in best
    ]


def _overflow(read: Read) -> HTMError:
    largest = float(np.abs(read.request.queries).max())
    return InvalidArgument(
        f"the attention overflows float32: queries of up to {largest:g} are too large for this session's tokens"
    )
