"""The way of a search on the event loop: from its checked request to what was found, with payloads.

    search -> the device thread's queue, as an attend, in parts where it needs them -> payloads

Does not know HTTP. It is no recall.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from htm_service.config import EngineConfig
from htm_service.errors import InvalidArgument, SessionDamaged
from htm_service.reads.attends import Attends, name_of
from htm_service.reads.search.finder import Find
from htm_service.records import AttendRequest, SearchAllResult, SearchRequest, SearchResult, Timing
from htm_service.sessions.payloads import Payloads
from htm_service.sessions.session import Session

FOUND_BYTES = 80
"""About what a found token takes in an answer, without its payload."""
AT_ONCE = 64
"""Sessions of one search that are searched together."""


class Searches:
    """See the head of this module. Raises only `htm_service.errors`."""

    def __init__(self, config: EngineConfig, attends: Attends, payloads: Payloads) -> None:
        self._config = config
        self._payloads = payloads
        self._attends = attends
        self.num_searches = 0
        """Answered since the start, through however many sessions."""
        self.num_queries = 0
        """Of these searches."""

    async def search(self, session: Session, request: SearchRequest) -> SearchResult:
        """The tokens that score best against each query of a checked request."""
        while True:
            result = await self._find(session, request)
            answer = await self._with_payloads(session, result) if request.payloads else result
            # Else they may be of tokens that came later.
            if not request.payloads or session.resident.num_begun == result.num_truncated:
                self._count(request)
                return answer

    async def search_all(self, sessions: Sequence[Session], request: SearchRequest) -> SearchAllResult:
        """The same over all these sessions together; equal scores in their order."""
        while True:
            results: list[SearchResult] = []
            for first in range(0, len(sessions), AT_ONCE):
                some = sessions[first : first + AT_ONCE]
                results += await asyncio.gather(*(self._find(session, request) for session in some))
            best = _best(results, len(request.queries), request.num_wanted)
            if request.payloads:  # of the best alone
                kept = [_only(result, place, best) for place, result in enumerate(results)]
                filled = await asyncio.gather(*map(self._with_payloads, sessions, kept))
                results = [
                    result._replace(payloads=only.payloads) for result, only in zip(results, filled, strict=True)
                ]
            seen = zip(sessions, results, strict=True)
            if not request.payloads or all(of.resident.num_begun == result.num_truncated for of, result in seen):
                break
        self._count(request)
        timing = max((result.timing for result in results), key=lambda timing: timing.compute_s, default=Timing())
        return SearchAllResult([session.id for session in sessions], results, best, timing)

    def _count(self, request: SearchRequest) -> None:
        self.num_searches += 1
        self.num_queries += len(request.queries)

    async def _find(self, session: Session, request: SearchRequest) -> SearchResult:
        num_found = min(request.num_wanted, max(1, session.length - session.first_position))
        num_bytes = len(request.queries) * num_found * (FOUND_BYTES + request.embeddings * 4 * session.settings.dim)
        if num_bytes > self._config.max_answer_bytes:
            raise InvalidArgument(
                f"the answer to {len(request.queries)} queries has up to {num_bytes} bytes, the limit of one answer "
                f"is {self._config.max_answer_bytes}: ask fewer queries at once, or for fewer tokens"
            )
        seen = AttendRequest(
            queries=request.queries,
            model=request.model,
            start=request.start,
            stop=request.stop,
            episodes=request.episodes,
            mask=request.mask,
            timeout_s=request.timeout_s,
            request_id=request.request_id,
        )
        num_scored = request.num_wanted * (request.oversample or self._config.oversample)
        find = Find(
            session.resident,
            await self._attends.weights_of(session, name_of(session, seen), seen),
            seen,
            num_wanted=request.num_wanted,
            num_scored=min(num_scored, max(1, session.length)),
            exact=request.exact,
            embeddings=request.embeddings,
        )
        try:
            result = await self._attends.compute(session, find)
        except SessionDamaged as error:
            session.damage = error.detail
            raise
        assert isinstance(result, SearchResult)
        return _above(result, request.min_score)

    async def _with_payloads(self, session: Session, result: SearchResult) -> SearchResult:
        found = result.position[result.position >= 0]
        counts = np.ones(len(found), np.int64)
        if len(result.position) > 1:  # one query finds nothing twice
            found, counts = np.unique(found, return_counts=True)
        positions = found.tolist()
        try:
            texts = await self._payloads.of(session, positions, result.num_truncated)
        except SessionDamaged as error:
            session.damage = error.detail
            raise
        listed = zip(positions, counts.tolist(), strict=True)
        num_bytes = sum(len(texts[position]) * count for position, count in listed if position in texts)
        if num_bytes > self._config.max_answer_bytes:
            raise InvalidArgument(
                f"what was found has payloads of {num_bytes} bytes, the limit of one answer is "
                f"{self._config.max_answer_bytes}: ask fewer queries at once, or for fewer tokens"
            )
        return result._replace(payloads=texts)


def _above(result: SearchResult, min_score: float | None) -> SearchResult:
    """What scores at least `min_score`, which is the first of each row."""
    if min_score is None:
        return result
    position = np.where(result.score >= np.float32(min_score), result.position, -1)
    embeddings = result.embeddings
    if embeddings is not None:
        embeddings = np.where(position[..., None] >= 0, embeddings, np.float32(0))
    return result._replace(
        position=position, score=np.where(position >= 0, result.score, np.float32(0)), embeddings=embeddings
    )


def _best(results: Sequence[SearchResult], num_queries: int, num_wanted: int) -> list[list[tuple[int, int]]]:
    """Per query the best of all results: which result, and the place there."""
    best: list[list[tuple[int, int]]] = []
    for query in range(num_queries):
        found = [
            (-float(score), place, at)
            for place, result in enumerate(results)
            for at, (score, position) in enumerate(zip(result.score[query], result.position[query], strict=True))
            if position >= 0
        ]
        best.append([(place, at) for _, place, at in sorted(found)[:num_wanted]])
    return best


def _only(result: SearchResult, place: int, best: Sequence[Sequence[tuple[int, int]]]) -> SearchResult:
    """A result with those of its positions that are among the best."""
    position = np.full(result.position.shape, -1)
    for query, row in enumerate(best):
        for of, at in row:
            if of == place:
                position[query, at] = result.position[query, at]
    return result._replace(position=position)
