"""What an attend costs, and how one that costs more than a batch may is cut into parts that others come between.

Shapes: Q queries, D width, H heads, E width per head, C chunk size, M chunks, K selected chunks.
Does not know queues, devices or storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from htm_service.attention.model_config import ModelConfig
from htm_service.records import AttendRequest, AttendResult, SearchResult, SelectResult

Answer = TypeVar("Answer", AttendResult, SelectResult, SearchResult)
ROWS = ("output", "chunk_index", "chunk_weight", "chunk_logit", "recalled", "position", "score", "embeddings")
"""Fields of an answer that have a row for each query."""
PRODUCTS_OF_ANY_QUERY = 1 << 20
"""What a query costs before any arithmetic, in multiply-adds: about 30 us of a core."""

PRODUCTS_OF_A_RUN = 1 << 12
"""What each run of tokens of one episode costs whoever asks for some episodes: about 0.1 us of a core."""


def products_per_query(config: ModelConfig, *, dim: int, length: int, chunk_size: int, top_k: int) -> int:
    """Multiply-adds of one query: its projections, M summary keys, and K chunks, twice for each head."""
    num_chunks = -(-length // chunk_size)
    tokens = min(top_k, num_chunks) * chunk_size
    projections = 0 if config.dim_head is None else dim + 4 * config.heads * config.dim_head
    return PRODUCTS_OF_ANY_QUERY + dim * (num_chunks + 2 * config.heads * tokens + projections)


def split(request: AttendRequest, max_queries: int, length: int) -> list[AttendRequest]:
    """A checked request of more than `max_queries` in equal parts that all see one `length`."""
    num_queries = len(request.queries)
    size = -(-num_queries // -(-num_queries // max_queries))
    stop = length if request.stop is None else request.stop
    parts = []
    for first in range(0, num_queries, size):
        rows = slice(first, first + size)
        chunk_mask = request.chunk_mask
        if chunk_mask is not None and chunk_mask.ndim == 2:
            chunk_mask = chunk_mask[rows]
        stops = None if request.stops is None else request.stops[rows]
        parts.append(replace(request, queries=request.queries[rows], stop=stop, stops=stops, chunk_mask=chunk_mask))
    return parts


def merge(results: Sequence[Answer], length: int) -> Answer:
    """The parts' results as that of the whole, which saw `length` tokens.

    Of a select the parts say which chunks they take, and no more.
    """
    first = results[0]
    timing = first.timing._replace(compute_s=sum(result.timing.compute_s for result in results))
    rows = {name: _joined(results, name) for name in ROWS if name in first._fields}
    return first._replace(**rows, length=length, timing=timing)


def _joined(results: Sequence[Answer], name: str) -> Any:
    """A field with one row for each query, of all results."""
    rows = [getattr(result, name) for result in results]
    if rows[0] is None:
        return None
    return np.concatenate(rows) if isinstance(rows[0], np.ndarray) else [row for some in rows for row in some]
