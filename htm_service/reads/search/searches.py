"""The way of a search on the event loop: from its checked request to what was found, with payloads.

    search -> the device thread's queue, as an attend, in parts where it needs them -> payloads

Does not know HTTP. It is no recall.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from htm_service.config import EngineConfig
from htm_service.errors import HTMError, InvalidArgument, SessionDamaged, SessionNotFound
from htm_service.reads.attends import Attends, name_of
from htm_service.reads.search.finder import Find
from htm_service.records import FOUND_BYTES, AttendRequest, SearchAllResult, SearchRequest, SearchResult, Timing
from htm_service.sessions.payloads import Payloads, Texts
from htm_service.sessions.session import Session

PLACE_BYTES = 12
"""Of each of the n places that a query has, though nothing may be found for it: a position and a score."""


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
        answer = await self._answer(session, request, self._attends.deadline_of(request))
        self._count(request)
        return answer

    async def _answer(self, session: Session, request: SearchRequest, limit: tuple[float, float]) -> SearchResult:
        while True:
            result = await self._find(session, request, limit)
            answer = await self._with_payloads(session, result) if request.payloads else result
            if not request.payloads or _is_as_of(session, result):
                return answer

    async def search_each(
        self, wanted: Sequence[tuple[Session, SearchRequest]], *, num_items: int
    ) -> list[SearchResult | Exception]:
        """Checked requests of several sessions as one entry of the device's queue; one that fails takes no other along.

        They have one deadline, the first's, and one answer, in which each of `num_items` has places for what it finds.
        Raises InvalidArgument where that would hold too much.
        """
        limit = self._attends.deadline_of(wanted[0][1])
        num_bytes = sum(_answer_bytes(session, request) for session, request in wanted)
        others = (num_items - len(wanted)) * _held_bytes(*wanted[0])
        self._check_size(f"the answer to {num_items} searches", num_bytes + others)
        outcomes: dict[int, SearchResult | Exception] = {}
        jobs: list[tuple[Session, Find]] = []
        places: list[int] = []
        for place, (session, request) in enumerate(wanted):
            try:
                jobs.append((session, await self._asked(session, request)))
                places.append(place)
            except HTMError as error:
                outcomes[place] = error
        for place, outcome in zip(places, await self._attends.compute_all(jobs, *limit), strict=True):
            session, request = wanted[place]
            assert isinstance(outcome, SearchResult | Exception)
            outcomes[place] = outcome if isinstance(outcome, Exception) else _above(outcome, request.min_score)
        await self._fill_each(wanted, outcomes)
        for place, (session, request) in enumerate(wanted):
            outcome = outcomes[place]
            if isinstance(outcome, SessionDamaged):
                session.damage = outcome.detail
            elif isinstance(outcome, SearchResult):
                if request.payloads and not _is_as_of(session, outcome):
                    try:
                        outcomes[place] = await self._answer(session, request, limit)
                    except HTMError as error:
                        outcomes[place] = error
                self._count(request)
        return [outcomes[place] for place in range(len(wanted))]

    async def search_all(
        self, sessions: Sequence[Session], request: SearchRequest, *, are_named: bool
    ) -> SearchAllResult:
        """The same over all these sessions together; equal scores in their order. All of it has one deadline.

        One that is deleted meanwhile is left out, unless they `are_named`. Raises what any of them failed with.
        """
        limit = self._attends.deadline_of(request)
        num_found = min(request.num_wanted, sum(session.length - session.first_position for session in sessions))
        held = sum(_held_bytes(session, request) for session in sessions)
        what = f"what {len(request.queries)} queries find in {len(sessions)} sessions"
        self._check_size(what, held + len(request.queries) * num_found * FOUND_BYTES)
        while True:
            found = await self._find_all(sessions, request, limit, are_named=are_named)
            sessions, results = list(found), list(found.values())
            best = _best(results, len(request.queries))
            if not request.payloads:
                break
            outcomes: dict[int, SearchResult | Exception] = dict(enumerate(_only(results, best)))
            await self._fill_each([(session, request) for session in sessions], outcomes)
            if not are_named and any(isinstance(one, SessionNotFound) for one in outcomes.values()):
                continue
            results = [result._replace(payloads=_payloads(outcomes[at])) for at, result in enumerate(results)]
            if all(map(_is_as_of, sessions, results)):
                break
        self._count(request)
        timing = max((result.timing for result in results), key=lambda timing: timing.compute_s, default=Timing())
        return SearchAllResult([session.id for session in sessions], results, best, timing)

    async def _find_all(
        self, sessions: Sequence[Session], request: SearchRequest, limit: tuple[float, float], *, are_named: bool
    ) -> dict[Session, SearchResult]:
        """What each session has, as one entry of the device's queue; of those that are not named, each that is left."""
        jobs = [(session, await self._asked(session, request)) for session in sessions]
        results: dict[Session, SearchResult] = {}
        for session, outcome in zip(sessions, await self._attends.compute_all(jobs, *limit), strict=True):
            if isinstance(outcome, SessionDamaged):
                session.damage = outcome.detail
            if isinstance(outcome, SessionNotFound) and not are_named:
                continue
            if isinstance(outcome, Exception):
                raise outcome
            assert isinstance(outcome, SearchResult)
            results[session] = _above(outcome, request.min_score)
        return results

    def _count(self, request: SearchRequest) -> None:
        self.num_searches += 1
        self.num_queries += len(request.queries)

    async def _find(self, session: Session, request: SearchRequest, limit: tuple[float, float]) -> SearchResult:
        self._check_size(f"the answer to {len(request.queries)} queries", _answer_bytes(session, request))
        try:
            result = await self._attends.compute(session, await self._asked(session, request), limit)
        except SessionDamaged as error:
            session.damage = error.detail
            raise
        assert isinstance(result, SearchResult)
        return _above(result, request.min_score)

    async def _asked(self, session: Session, request: SearchRequest) -> Find:
        """A checked request as the device's thread takes it. Raises ModelNotFound, InvalidArgument."""
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
        return Find(
            session.resident,
            await self._attends.weights_of(session, name_of(session, seen), seen),
            seen,
            num_wanted=request.num_wanted,
            num_scored=min(num_scored, max(1, session.length)),
            exact=request.exact,
            embeddings=request.embeddings,
        )

    def _check_size(self, what: str, num_bytes: int) -> None:
        """Raise InvalidArgument for an answer that would hold too much, whatever the payloads."""
        if num_bytes > self._config.max_answer_bytes:
            raise InvalidArgument(
                f"{what} has up to {num_bytes} bytes, the limit of one answer is {self._config.max_answer_bytes}: "
                "ask fewer queries or sessions at once, or for fewer tokens"
            )

    async def _fill_each(
        self, wanted: Sequence[tuple[Session, SearchRequest]], outcomes: dict[int, SearchResult | Exception]
    ) -> None:
        """Add payloads to the results that are to have them, in place, no more together than an answer may hold."""
        found = [
            (place, wanted[place][0], result)
            for place, result in sorted(outcomes.items())
            if isinstance(result, SearchResult) and wanted[place][1].payloads
        ]
        reads = (self._payloads.of(session, _counts(result)[0], result.num_truncated) for _, session, result in found)
        left = self._config.max_answer_bytes
        for (place, _, result), texts in zip(found, await asyncio.gather(*reads, return_exceptions=True), strict=True):
            try:
                if isinstance(texts, BaseException):
                    raise texts
                outcomes[place], num_bytes = self._filled(result, texts, left)
                left -= num_bytes
            except HTMError as error:
                outcomes[place] = error

    async def _with_payloads(self, session: Session, result: SearchResult) -> SearchResult:
        try:
            texts = await self._payloads.of(session, _counts(result)[0], result.num_truncated)
        except SessionDamaged as error:
            session.damage = error.detail
            raise
        return self._filled(result, texts, self._config.max_answer_bytes)[0]

    def _filled(self, result: SearchResult, texts: Texts, most: int) -> tuple[SearchResult, int]:
        """The result with these payloads, and their bytes, each as often as it is there. Raises InvalidArgument."""
        num_bytes = sum(len(texts[at]) * count for at, count in zip(*_counts(result), strict=True) if at in texts)
        if num_bytes > most:
            raise InvalidArgument(
                f"what was found has payloads of {num_bytes} bytes, the limit of one answer is "
                f"{self._config.max_answer_bytes}: ask fewer queries at once, or for fewer tokens"
            )
        return result._replace(payloads=texts), num_bytes


def _is_as_of(session: Session, result: SearchResult) -> bool:
    """Whether payloads that were read are of the tokens found; after a truncation they may be of later ones."""
    return session.resident.num_begun == result.num_truncated


def _counts(result: SearchResult) -> tuple[list[int], list[int]]:
    """The positions that were found, and how often each."""
    found = result.position[result.position >= 0]
    if len(result.position) == 1:  # one query finds nothing twice
        return found.tolist(), [1] * len(found)
    positions, counts = np.unique(found, return_counts=True)
    return positions.tolist(), counts.tolist()


def _payloads(outcome: SearchResult | Exception) -> Texts | None:
    """Those of a result. Raises what it failed with."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome.payloads


def _above(result: SearchResult, min_score: float | None) -> SearchResult:
    """What scores at least `min_score`, which is the first of each row."""
    if min_score is None:
        return result
    with np.errstate(over="ignore"):  # beyond float32 all is less, or nothing
        least = np.float32(min_score)
    position = np.where(result.score >= least, result.position, -1)
    embeddings = result.embeddings
    if embeddings is not None:
        embeddings = np.where(position[..., None] >= 0, embeddings, np.float32(0))
    return result._replace(
        position=position, score=np.where(position >= 0, result.score, np.float32(0)), embeddings=embeddings
    )


def _best(results: Sequence[SearchResult], num_queries: int) -> list[list[tuple[int, int]]]:
    """Per query the best of all results: which result, and the place there."""
    if not results:
        return [[] for _ in range(num_queries)]
    score = np.concatenate([result.score for result in results], axis=1)
    is_found = np.concatenate([result.position for result in results], axis=1) >= 0
    worse = np.where(is_found, -score, np.float32(np.inf))
    width = results[0].score.shape[1]  # of every one, and n
    last = np.partition(worse, width - 1, axis=1)[:, width - 1]  # of the best n; to sort all takes five times as long
    rows = [np.flatnonzero(found & (of <= most)) for of, found, most in zip(worse, is_found, last, strict=True)]
    return [
        [divmod(at, width) for at in row[np.argsort(of[row], kind="stable")][:width].tolist()]
        for of, row in zip(worse, rows, strict=True)
    ]


def _only(results: Sequence[SearchResult], best: Sequence[Sequence[tuple[int, int]]]) -> list[SearchResult]:
    """The results with those of their positions that are among the best."""
    positions = [np.full(result.position.shape, -1) for result in results]
    for query, row in enumerate(best):
        for of, at in row:
            positions[of][query, at] = results[of].position[query, at]
    return [result._replace(position=position) for result, position in zip(results, positions, strict=True)]


def _answer_bytes(session: Session, request: SearchRequest) -> int:
    """Of the answer to one search, at most and without payloads."""
    num_found = min(request.num_wanted, session.length - session.first_position)
    return _held_bytes(session, request) + len(request.queries) * num_found * FOUND_BYTES


def _held_bytes(session: Session, request: SearchRequest) -> int:
    """Of its numbers alone: there are n places for each query, however short the session is."""
    vector_bytes = request.embeddings * 4 * session.settings.dim
    return len(request.queries) * request.num_wanted * (PLACE_BYTES + vector_bytes)
