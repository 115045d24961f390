"""The read path: a batch of attends over many sessions, from queries to attended vectors.

Shapes: R rows (all queries of a group), Q queries of one read, D width, H heads, C chunk size, M chunks,
K selected chunks.
For each group of reads that share a model and an arena: fold the queries, have the kernel select chunks and attend
in them, project. Everything else about a request is decided before
(engine) or after (recalls). Does not know: queues, storage, payloads, times of day.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from htm_service.attention.model import Model
from htm_service.errors import HTMError, InvalidArgument
from htm_service.kernels import Attended, Kernel, Search, View
from htm_service.memory.chunks import Memory
from htm_service.reads.visibility import Visibility, partial_keys, seen_in_part
from htm_service.records import AttendRequest, AttendResult, Floats, Ints, Recalled

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Read:
    """One attend, ready to run: `request.queries` is [Q, D], checked; `top_k` is resolved."""

    memory: Memory
    model: Model
    request: AttendRequest
    visibility: Visibility
    top_k: int
    known_keys: Mapping[int, Tensor] = field(default_factory=dict)
    """Keys [D] of chunks seen in part that were computed elsewhere."""


class Missing(NamedTuple):
    """Chunks, lowest first, whose contents a read needs and that have no page.

    With `in_part` it needs them for their keys, and which chunks it takes is not known before.
    """

    chunks: list[int]
    in_part: bool


class Reader:
    """Runs batches of reads with one kernel, on one thread."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, reads: Sequence[Read]) -> list[AttendResult | Exception]:
        """One result per read, in order; a read that fails by itself gets its own error.

        Every chunk that a read takes or sees in part must have its page; see `missing`.
        """
        return self._by_group(reads, self._run_group)

    def missing(self, reads: Sequence[Read]) -> list[Missing]:
        """Per read, what must be fetched before `run`."""
        return self._by_group(reads, self._missing_of_group)

    def _by_group(self, reads: Sequence[Read], run: Callable[[list[list[Read]]], list[T]]) -> list[T]:
        """Run groups of reads that share a model and an arena, those that see the same together; results in order."""
        groups: dict[tuple[int, int], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for place, read in enumerate(reads):
            groups[id(read.model), id(read.memory.arena)][_what_is_seen(read, place)].append(place)
        results: dict[int, T] = {}
        with torch.inference_mode():
            for alike in groups.values():
                places = [place for places in alike.values() for place in places]
                group = [[reads[place] for place in places] for places in alike.values()]
                results.update(zip(places, run(group), strict=True))
        return [results[place] for place in range(len(reads))]

    def _missing_of_group(self, alike: list[list[Read]]) -> list[Missing]:
        in_part = [_missing_in_part(together[0]) for together in alike]
        ready = [together for together, missing in zip(alike, in_part, strict=True) if not missing]
        chosen: list[Missing] = []
        if ready:
            reads = [read for together in ready for read in together]
            folded = reads[0].model.fold(_stack_queries(reads), self.kernel)
            index = self.kernel.select(_view(ready, reads).batch(folded.summary, folded.heads)).cpu().numpy()
            stop = 0
            for read in reads:
                rows = index[stop : (stop := stop + len(read.request.queries))]
                chosen.append(Missing(read.memory.missing(np.unique(rows[rows >= 0]).tolist()), in_part=False))
        found = iter(chosen)
        return [
            Missing(missing, in_part=True) if missing else next(found)
            for together, missing in zip(alike, in_part, strict=True)
            for _ in together
        ]

    def _run_group(self, alike: list[list[Read]]) -> list[AttendResult | Exception]:
        reads = [read for together in alike for read in together]
        attended, output = reads[0].model.answer(_stack_queries(reads), _view(alike, reads), self.kernel)
        return _split(reads, output, attended)


def _view(alike: list[list[Read]], reads: list[Read]) -> View:
    """What a group looks at: the reads of `alike` in one row."""
    model, arena = reads[0].model, reads[0].memory.arena
    return View(
        arena,
        model.positions(arena.chunk_size),
        [_search(together) for together in alike],
        tokens=any(read.request.tokens for read in reads),
    )


def _what_is_seen(read: Read, place: int) -> tuple[int, ...]:
    """Equal for reads that can share a search; masks are not compared, such a read stays alone."""
    visibility = read.visibility
    if visibility.token_mask is not None or visibility.chunk_mask is not None:
        return (place,)
    return id(read.memory), visibility.start, visibility.stop, read.top_k


def _missing_in_part(read: Read) -> list[int]:
    """The chunks that a read sees in part, whose keys are not known and whose contents are not here."""
    first, last = read.visibility.chunk_range(read.memory.chunk_size)
    in_part = seen_in_part(read.memory, read.visibility, first, last) if first < last else None
    if in_part is None:
        return []
    return read.memory.missing([chunk for chunk in in_part.chunks.tolist() if chunk not in read.known_keys])


def _search(together: list[Read]) -> Search:
    """What reads that see the same look through: the keys of the chunks they see, those seen in part recomputed."""
    read, num_queries = together[0], sum(len(read.request.queries) for read in together)
    memory, visibility = read.memory, read.visibility
    first, last = visibility.chunk_range(memory.chunk_size)
    keys, pages = memory.tables(first, last)
    hidden: Tensor | None = None
    in_part = seen_in_part(memory, visibility, first, last) if first < last else None
    allowed = visibility.allowed(first, last, num_queries)
    if allowed is not None:
        hidden = ~torch.tensor(allowed, device=keys.device)
    if in_part is not None:
        keys = keys.clone()
        keys[in_part.chunks - first] = partial_keys(memory, in_part, read.known_keys)
        if len(in_part.hidden):
            hidden = keys.new_zeros(len(keys), dtype=torch.bool) if hidden is None else hidden
            hidden[..., in_part.hidden - first] = True
    token_mask = None if visibility.token_mask is None else torch.from_numpy(visibility.token_mask).to(keys.device)
    k = min(read.top_k, last - first)
    return Search(keys, pages, first, visibility.start, visibility.stop, num_queries, k, token_mask, hidden)


def _stack_queries(reads: list[Read]) -> Tensor:
    """All queries [R, D] float32 on the device."""
    return torch.from_numpy(np.concatenate([read.request.queries for read in reads])).to(reads[0].memory.arena.device)


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
