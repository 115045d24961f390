"""The read path: a batch of attends over many sessions, from queries to attended vectors.

Shapes: R rows (all queries of a group), Q queries of one read, D width, H heads, C chunk size, M chunks,
K selected chunks.
For each group of reads that share a model and an arena: fold the queries, have the kernel select chunks and attend
in them, project. Everything else about a request is decided before
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

from htm_service.errors import HTMError, InvalidArgument
from htm_service.kernels import Attended, Batch, Kernel, Search
from htm_service.memory import Memory
from htm_service.models import Model
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


class Reader:
    """Runs batches of reads with one kernel, on one thread."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, reads: Sequence[Read]) -> list[AttendResult | Exception]:
        """One result per read, in order; a read that fails by itself gets its own error."""
        groups: dict[tuple[int, int], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for place, read in enumerate(reads):
            groups[id(read.model), id(read.memory.arena)][_what_is_seen(read, place)].append(place)
        results: dict[int, AttendResult | Exception] = {}
        with torch.inference_mode():
            for alike in groups.values():
                places = [place for places in alike.values() for place in places]
                group = [[reads[place] for place in places] for places in alike.values()]
                results.update(zip(places, self._run_group(group), strict=True))
        return [results[place] for place in range(len(reads))]

    def _run_group(self, alike: list[list[Read]]) -> list[AttendResult | Exception]:
        """Fold, attend, project: reads of one model and one arena, those that see the same together."""
        reads = [read for together in alike for read in together]
        model, arena = reads[0].model, reads[0].memory.arena
        folded = model.fold(_stack_queries(reads, arena.device), self.kernel)
        attended = self.kernel.attend(
            Batch(
                arena,
                folded.summary,
                folded.heads,
                model.positions(arena.chunk_size),
                [_search(together) for together in alike],
                tokens=any(read.request.tokens for read in reads),
            )
        )
        output = model.project(attended.z, folded, (attended.chunk_index >= 0).any(dim=-1), self.kernel)
        return _split(reads, output, attended)


def _what_is_seen(read: Read, place: int) -> tuple[int, ...]:
    """Equal for reads that can share a search; masks are not compared, such a read stays alone."""
    visibility = read.visibility
    if visibility.token_mask is not None or visibility.chunk_mask is not None:
        return (place,)
    return id(read.memory), visibility.start, visibility.stop, read.top_k


def _search(together: list[Read]) -> Search:
    """What reads that see the same look through: the keys of the chunks they see, those seen in part recomputed."""
    read, num_queries = together[0], sum(len(read.request.queries) for read in together)
    memory, visibility = read.memory, read.visibility
    first, last = visibility.chunk_range(memory.chunk_size)
    keys, pages = memory.keys, memory.page_table
    if last - first < memory.num_chunks:
        keys, pages = keys[first:last], pages[first:last]
    hidden: Tensor | None = None
    in_part = partial_keys(memory, visibility, first, last) if first < last else None
    allowed = visibility.allowed(first, last, num_queries)
    if allowed is not None:
        hidden = ~torch.tensor(allowed, device=keys.device)
    if in_part is not None:
        partial, means, unseen = in_part
        keys = keys.clone()
        keys[partial - first] = means
        if len(unseen):
            hidden = keys.new_zeros(len(keys), dtype=torch.bool) if hidden is None else hidden
            hidden[..., unseen - first] = True
    token_mask = None if visibility.token_mask is None else torch.from_numpy(visibility.token_mask).to(keys.device)
    k = min(read.top_k, last - first)
    return Search(keys, pages, first, visibility.start, visibility.stop, num_queries, k, token_mask, hidden)


def _stack_queries(reads: list[Read], device: torch.device) -> Tensor:
    """All queries [R, D] float32 on the device."""
    return torch.from_numpy(np.concatenate([read.request.queries for read in reads])).to(device)


def _split(reads: list[Read], output: Tensor, attended: Attended) -> list[AttendResult | Exception]:
    """Cut the group's tensors into one result per read, on the host."""
    outputs, indexes, weights, token_weights, token_scores = (
        None if tensor is None else tensor.cpu().numpy()
        for tensor in (
            *(output, attended.chunk_index, attended.chunk_weight),
            *(attended.token_weight, attended.token_score),
        )
    )
    assert outputs is not None and indexes is not None and weights is not None
    is_finite = np.isfinite(outputs).all(axis=1) & np.isfinite(weights).all(axis=1)
    results: list[AttendResult | Exception] = []
    stop = 0
    for read in reads:
        rows = slice(stop, stop := stop + len(read.request.queries))
        if not is_finite[rows].all():
            results.append(_overflow(read))
            continue
        first, last = read.visibility.chunk_range(read.memory.chunk_size)
        width = min(read.top_k, last - first)  # of its own search; the batch's may be greater
        recalled: list[list[Recalled]] | None = None
        if read.request.tokens and token_weights is not None and token_scores is not None:
            recalled = [
                _rank(read, *row)
                for row in zip(indexes[rows], weights[rows], token_weights[rows], token_scores[rows], strict=True)
            ]
        index_of, weight_of = indexes[rows, :width].copy(), weights[rows, :width].copy()
        results.append(AttendResult(outputs[rows], index_of, weight_of, recalled, read.memory.length))
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
