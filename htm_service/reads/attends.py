"""The way of an attend on the event loop: its cost, its deadline, another try or parts where it needs them, payloads.

    attend -> the device thread's queue -> a batch (worker.py) -> payloads from the store -> the account of it

Does not know HTTP, nor how attention is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from htm_service.attention.catalog import Catalog
from htm_service.config import EngineConfig
from htm_service.errors import HTMError, InvalidArgument, LengthConflict, SessionDamaged
from htm_service.memory.resident import Extent
from htm_service.reads.cost import merge, split
from htm_service.reads.runner import Attend
from htm_service.reads.visibility import KnownKeys, Trimmed, Truncated
from htm_service.reads.weights import Outgrown, Weights
from htm_service.reads.worker import DeviceWorker
from htm_service.records import (
    AttendRequest,
    AttendResult,
    Explanation,
    SearchRequest,
    SearchResult,
    SelectResult,
    recalled_bytes,
)
from htm_service.sessions.accounts import Accounts
from htm_service.sessions.payloads import Payloads
from htm_service.sessions.session import Session
from htm_service.sessions.validation import check_model_dim
from htm_service.threads.batcher import within

Answer = AttendResult | SelectResult | SearchResult


class _Row(NamedTuple):
    """One of several requests, `place` among them, with the name of its model."""

    place: int
    session: Session
    name: str
    asked: Attend


class Answered(NamedTuple):
    """What became of several requests, the rows of those that could begin, and what was computed, without payloads."""

    rows: Sequence[_Row]
    computed: Sequence[AttendResult | Exception]
    outcomes: list[AttendResult | Exception]


class Attends:
    """See the head of this module. Raises only `htm_service.errors`."""

    def __init__(
        self,
        config: EngineConfig,
        catalog: Catalog,
        worker: DeviceWorker,
        payloads: Payloads,
        accounts: Accounts,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._worker = worker
        self._payloads = payloads
        self._accounts = accounts
        self._clock = clock
        self.num_attends = 0
        """Answered since the start, whatever they were cut into."""
        self.num_queries = 0
        """Of these attends."""

    async def attend(self, session: Session, request: AttendRequest) -> AttendResult:
        """Answer a checked request over the session as it is now, or as it was at `stop`."""
        name = name_of(session, request)
        result, answer = await self._answered(session, name, request, self.deadline_of(request))
        self._account(session, request, result, name)
        return answer

    async def attend_all(
        self, wanted: Sequence[tuple[Session, AttendRequest]], *, num_items: int
    ) -> list[AttendResult | Exception]:
        """Answer several checked requests as one entry of the device's queue; one that fails takes no other along.

        They have one deadline, the first's, and one answer, in which all are as wide as the widest and which
        `num_items` share. Raises InvalidArgument where that would hold too much.
        """
        answered = await self.answer_all(wanted, num_items=num_items)
        self.account(answered)
        return answered.outcomes

    async def answer_all(self, wanted: Sequence[tuple[Session, AttendRequest]], *, num_items: int) -> Answered:
        """The same, to be accounted for."""
        if not wanted:
            return Answered([], [], [])
        limit = self.deadline_of(wanted[0][1])
        outcomes: dict[int, AttendResult | Exception] = {}
        rows: list[_Row] = []
        for place, (session, request) in enumerate(wanted):
            try:
                name = name_of(session, request)
                asked = Attend(session.resident, await self.weights_of(session, name, request), request)
                rows.append(_Row(place, session, name, asked))
            except HTMError as error:
                outcomes[place] = error
        self.check_answers([row.asked for row in rows], num_items)
        jobs = [(row.session, row.asked) for row in rows]
        for row, outcome in zip(rows, await self.compute_all(jobs, *limit), strict=True):
            assert not isinstance(outcome, SelectResult | SearchResult)
            outcomes[row.place] = outcome
        computed = [outcomes[place] for place in range(len(wanted))]
        if any(request.payloads for _, request in wanted):
            await self._add_payloads([row for row in rows if row.asked.request.payloads], outcomes, limit)
        return Answered(rows, computed, [outcomes[place] for place in range(len(wanted))])

    def account(self, answered: Answered) -> None:
        """Count and keep what was answered to several requests, and what was found damaged."""
        for row in answered.rows:
            computed, outcome = answered.computed[row.place], answered.outcomes[row.place]
            if isinstance(outcome, SessionDamaged):
                row.session.damage = outcome.detail
            elif isinstance(outcome, AttendResult) and isinstance(computed, AttendResult):
                self._account(row.session, row.asked.request, computed, row.name)

    def _account(self, session: Session, request: AttendRequest, result: AttendResult, name: str) -> None:
        """Count an attend that was answered with the model `name`, keep its recall, and tell of it."""
        self.num_attends += 1
        self.num_queries += len(request.queries)
        session.num_attends += 1
        session.num_queries += len(request.queries)
        self._accounts.add(session, request, result, name, self._clock())

    async def explain(self, session: Session, request: AttendRequest, limit: int) -> Explanation:
        """How the one query of a checked request ranks the chunks it sees, `limit` of them. It is no recall."""
        name = name_of(session, request)
        _, result = await self._answered(session, name, request, self.deadline_of(request), num_ranked=limit)
        assert result.ranking is not None
        return Explanation(result, result.ranking, name)

    async def _answered(
        self, session: Session, name: str, request: AttendRequest, limit: tuple[float, float], num_ranked: int = 0
    ) -> tuple[AttendResult, AttendResult]:
        """The result, and the same with payloads where they are asked for; one deadline for all that is tried."""
        while True:
            result = await self._answer(session, name, request, limit, num_ranked)
            if not request.payloads:
                return result, result
            answer = await self._with_payloads(session, result)
            if session.resident.num_begun == result.num_truncated:  # else they may be of tokens that came later
                return result, answer

    async def _answer(
        self, session: Session, name: str, request: AttendRequest, limit: tuple[float, float], num_ranked: int
    ) -> AttendResult:
        asked = Attend(session.resident, await self.weights_of(session, name, request), request, num_ranked)
        try:
            result = await self.compute(session, asked, limit)
            assert isinstance(result, AttendResult)
            return result
        except SessionDamaged as error:
            session.damage = error.detail
            raise

    async def weights_of(self, session: Session, name: str, request: AttendRequest) -> Weights:
        """What the name of a model stands for. Raises ModelNotFound, and InvalidArgument for another width."""
        namespace, dim = session.key.namespace, session.settings.dim
        model = self._worker.models.served.find(namespace, name) or await self._catalog.get(namespace, name)
        if request.model is None and model.dim not in (None, dim):
            raise InvalidArgument(
                f"model {name!r}, which session {session.id!r} of width {dim} was given, has width {model.dim} now: "
                "it was replaced. Put one of that width back, name another model, or give the session one"
            )
        check_model_dim(name, model, dim)
        return Weights(namespace, name, dim, model, request.top_k)

    async def attend_before(self, session: Session, request: AttendRequest, position: int) -> AttendResult:
        """Attend to the session as it was before an append at `position`. Raises LengthConflict when that is gone."""
        stop = position if request.stop is None else min(request.stop, position)
        stops = None if request.stops is None else tuple(min(one, position) for one in request.stops)
        try:
            return (await self.attend(session, replace(request, stop=stop, stops=stops)))._replace(length=position)
        except Trimmed as error:
            raise LengthConflict(
                f"this step was made when the session's length was {position}, and {error}", length=session.length
            ) from None

    async def compute_all(
        self, wanted: Sequence[tuple[Session, Attend]], deadline: float, timeout_s: float
    ) -> list[Answer | Exception]:
        """What each finds: those that cost little enough as one entry of the queue, then the others on their own."""
        together: list[tuple[int, Attend, int]] = []
        alone: list[int] = []
        for place, (session, asked) in enumerate(wanted):
            attend = _admitted(asked, session.resident.extent)
            cost, at_once, _ = self._cost(session, attend)
            if len(attend.request.queries) <= at_once:
                together.append((place, attend, cost * len(attend.request.queries)))
            else:
                alone.append(place)
        outcomes: dict[int, Answer | Exception] = {}
        if together:
            entry = self._worker.submit_all([(attend, cost) for _, attend, cost in together])
            found = await entry.within(deadline, timeout_s)
            for (place, _, _), outcome in zip(together, found, strict=True):
                is_gone = isinstance(outcome, Trimmed) and wanted[place][1].request.stop is None
                if is_gone or isinstance(outcome, Outgrown | Truncated):  # it is admitted anew
                    alone.append(place)
                else:
                    outcomes[place] = outcome
        for place in alone:
            try:
                outcomes[place] = await self.compute(*wanted[place], (deadline, timeout_s))
            except HTMError as error:
                outcomes[place] = error
        return [outcomes[place] for place in range(len(wanted))]

    async def compute(self, session: Session, asked: Attend, limit: tuple[float, float]) -> Answer:
        """What `asked`, which is copied, finds in what is left of the tokens as of its admission.

        `limit` is a deadline on the loop's clock, and the seconds that it was away from the beginning, for all that
        is tried. Where nothing is left of the tokens it is admitted anew, and where its model takes more chunks since.
        Raises LengthConflict when its masks forbid the former.
        """
        request = asked.request
        deadline, timeout_s = limit
        extent, was_torn = session.resident.extent, False
        while True:
            self.check_answers([asked])
            attend, length = _admitted(asked, extent), extent.length
            cost, at_once, room = self._cost(session, attend)
            try:
                if len(request.queries) <= (room if was_torn else at_once):
                    return await within(self._worker.submit(attend, cost * len(request.queries)), deadline, timeout_s)
                result = await self._in_parts(attend, length, cost, at_once, deadline, timeout_s)
                if result is not None:
                    return result
                was_torn = True  # in a session that is trimmed all the time it would be so again
            except Outgrown:
                name = name_of(session, request)
                asked = replace(asked, weights=await self.weights_of(session, name, request))
            except Trimmed:
                if request.stop is not None:
                    raise
                if request.is_masked:
                    raise LengthConflict(
                        f"the masks are of {length} tokens, all of which were trimmed before the attend began",
                        length=session.length,
                    ) from None
                extent = session.resident.extent
            except Truncated as error:
                if request.is_masked and request.stop is None:
                    raise LengthConflict(f"the masks are of {length} tokens: {error}", length=session.length) from None
                await asyncio.sleep(0)  # the loop is told a moment after the device
                extent = session.resident.extent

    def deadline_of(self, request: AttendRequest | SearchRequest) -> tuple[float, float]:
        """When a request that comes now must be answered, on the loop's clock, and in how many seconds that is."""
        timeout_s = request.timeout_s or self._config.default_timeout_s
        return asyncio.get_running_loop().time() + timeout_s, timeout_s

    def _cost(self, session: Session, attend: Attend) -> tuple[int, int, int]:
        """Multiply-adds of one query; how many queries are cheap enough for one batch; how many there is room for."""
        cost = attend.products_per_query(session.length - session.first_position)
        # What they take must fit into half the budget, should none of it be on the device.
        room = max(1, self._config.memory_budget_bytes // 2 // attend.fetched_bytes)
        return cost, max(1, min(self._config.max_batch_products // cost, room)), room

    async def _in_parts(
        self, attend: Attend, length: int, cost: int, max_queries: int, deadline: float, timeout_s: float
    ) -> Answer | None:
        """Several attends that see one length, as one; None when a trim came between them. Raises Trimmed."""
        parts = [attend.part(part, length) for part in split(attend.request, max_queries, length)]
        futures: list[asyncio.Future[Any]] = []
        try:
            for part in parts:
                futures.append(self._worker.submit(part, cost * len(part.request.queries)))
            results = [await within(futures.pop(0), deadline, timeout_s) for _ in parts]
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        if len({part.seen.start for part in parts}) > 1:
            return None
        merged: Answer = merge(results, length)
        return merged

    async def _with_payloads(self, session: Session, result: AttendResult) -> AttendResult:
        """The result with the payloads of its recalled tokens."""
        if not result.recalled:
            return result
        most = self._config.max_answer_bytes
        try:
            texts = await self._payloads.of(session, _positions(result), result.num_truncated)
        except SessionDamaged as error:
            session.damage = error.detail
            raise
        return self._filled(result, texts, most)

    async def _add_payloads(
        self, rows: Sequence[_Row], outcomes: dict[int, AttendResult | Exception], limit: tuple[float, float]
    ) -> None:
        """The same for many results, in place, which hold no more together than one may."""
        found = [(row, result) for row in rows if isinstance(result := outcomes[row.place], AttendResult)]
        reads = (self._payloads.of(row.session, _positions(result), result.num_truncated) for row, result in found)
        left = self._config.max_answer_bytes
        for (row, result), texts in zip(found, await asyncio.gather(*reads, return_exceptions=True), strict=True):
            try:
                if row.session.resident.num_begun != result.num_truncated:  # they may be of tokens that came later
                    _, filled = await self._answered(row.session, row.name, row.asked.request, limit)
                elif isinstance(texts, BaseException):
                    raise texts
                else:
                    filled = self._filled(result, texts, left)
                outcomes[row.place] = filled
                left -= recalled_bytes(filled.recalled)
            except HTMError as error:
                outcomes[row.place] = error

    def _filled(self, result: AttendResult, texts: Mapping[int, bytes], most: int) -> AttendResult:
        """The result with these payloads. Raises InvalidArgument when its recalled tokens have more bytes."""
        recalled = [
            [replace(token, payload=texts.get(token.position)) for token in row] for row in result.recalled or ()
        ]
        if (num_bytes := recalled_bytes(recalled)) > most:
            what = f"the recalled tokens of {len(recalled)} queries have {num_bytes} bytes"
            raise _too_large(what, self._config.max_answer_bytes)
        return result._replace(recalled=recalled)

    def check_answers(self, attends: Sequence[Attend], num_items: int = 1) -> None:
        """Raise InvalidArgument for an answer that would hold too much, whatever the payloads.

        It has room for `num_items`, as much for each as for the widest: an item that fails has a place in it too.
        """
        most = self._config.max_answer_bytes
        widest = max((attend.tensor_bytes for attend in attends), default=0)
        num_bytes = num_items * widest + sum(attend.listed_bytes for attend in attends)
        if num_bytes > most:
            num_queries = num_items * max(len(attend.request.queries) for attend in attends)
            raise _too_large(f"the answer to {num_queries} queries has up to {num_bytes} bytes", most)


def name_of(session: Session, request: AttendRequest) -> str:
    """The name of the model that a request is computed with."""
    return session.settings.model if request.model is None else request.model


def _admitted(asked: Attend, extent: Extent) -> Attend:
    """An attend on its way: its masks are as long as the session is now, however long it waits."""
    attend = replace(asked, num_truncated=extent.num_truncated, known_keys=KnownKeys())  # parts share these
    if asked.request.is_masked and asked.request.stop is None:
        attend.see_as_of(extent.length)
    return attend


def _positions(result: AttendResult) -> list[int]:
    """Those of the recalled tokens, each once."""
    return sorted({token.position for row in result.recalled or () for token in row})


def _too_large(what: str, most: int) -> InvalidArgument:
    return InvalidArgument(
        f"{what}, the limit of one answer is {most}: ask fewer queries at once, or a smaller top_k or max_recalled"
    )
