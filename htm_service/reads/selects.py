"""The way of a select on the event loop: which chunks queries in key space take, with their keys and tokens.

    select -> the device thread's queue, as an attend, in parts where it needs them -> what they take, each chunk once

Does not know HTTP, nor weights: whoever asks computes attention elsewhere. It is no recall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from htm_service.attention.model import RetrievalModel
from htm_service.config import MAX_TOP_K
from htm_service.errors import HTMError, LengthConflict, SessionDamaged
from htm_service.reads.attends import Answer, Attends
from htm_service.reads.runner import ALL_OF_IT, Select, Share
from htm_service.reads.visibility import Trimmed, Truncated
from htm_service.reads.weights import Weights
from htm_service.reads.worker import DeviceWorker
from htm_service.records import AttendRequest, SelectResult
from htm_service.sessions.session import Session
from htm_service.threads.batcher import within


class Selects:
    """See the head of this module. Raises only `htm_service.errors`."""

    def __init__(self, worker: DeviceWorker, attends: Attends) -> None:
        self._worker = worker
        self._attends = attends
        self._key_space = RetrievalModel(summary_scale=1.0, attention_scale=1.0)
        """It projects and scales nothing: what queries are that meet summary keys as they come."""

    async def select(self, session: Session, request: AttendRequest, *, keys: bool, tokens: bool) -> SelectResult:
        """What a checked request takes of the session as it is now, or as it was at `stop`."""
        limit = self._attends.deadline_of(request)  # one for all that is asked of the device
        asked = await self._asked(session, request, keys, tokens, ALL_OF_IT)
        outcome: Answer | Exception
        try:
            outcome = await self._attends.compute(session, asked, limit)
        except SessionDamaged as error:
            outcome = error
        whole = await self._whole(session, asked, outcome, limit)
        if isinstance(whole, Exception):
            raise whole
        return whole

    async def select_all(
        self, wanted: Sequence[tuple[Session, AttendRequest]], *, num_items: int, keys: bool, tokens: bool
    ) -> list[SelectResult | Exception]:
        """The same for several sessions as one entry of the device's queue; one that fails takes no other along.

        They have one deadline, the first's, and one answer, in which all are as wide as the widest and which
        `num_items` share.
        """
        limit = self._attends.deadline_of(wanted[0][1])
        share = Share(num_items, max(session.settings.chunk_size for session, _ in wanted))
        outcomes: dict[int, SelectResult | Exception] = {}
        jobs: dict[int, tuple[Session, Select]] = {}
        for place, (session, request) in enumerate(wanted):
            try:
                jobs[place] = session, await self._asked(session, request, keys, tokens, share)
            except HTMError as error:
                outcomes[place] = error
        self._attends.check_answers([asked for _, asked in jobs.values()], num_items)
        found = await self._attends.compute_all(list(jobs.values()), *limit)
        for (place, (session, asked)), outcome in zip(jobs.items(), found, strict=True):
            outcomes[place] = await self._whole(session, asked, outcome, limit)
        return [outcomes[place] for place in range(len(wanted))]

    async def _asked(self, session: Session, request: AttendRequest, keys: bool, tokens: bool, share: Share) -> Select:
        """What is asked of the device. Raises ModelNotFound, and InvalidArgument for a model of another width."""
        top_k = request.top_k
        if top_k is None:
            top_k = (await self._attends.weights_of(session, session.settings.model, request)).top_k
        weights = Weights.fixed(self._key_space, top_k)
        return Select(session.resident, weights, request, keys=keys, tokens=tokens, share=share)

    async def _whole(
        self, session: Session, asked: Select, outcome: Answer | Exception, limit: tuple[float, float]
    ) -> SelectResult | Exception:
        """What was computed, with what its parts take, where they only said so."""
        if isinstance(outcome, SelectResult) and outcome.taken is None and (asked.keys or asked.tokens):
            try:
                return await self._bring(session, asked, outcome, limit)
            except HTMError as error:
                outcome = error
        if isinstance(outcome, SessionDamaged):
            session.damage = outcome.detail
        assert isinstance(outcome, SelectResult | Exception)
        return outcome

    async def _bring(
        self, session: Session, asked: Select, result: SelectResult, limit: tuple[float, float]
    ) -> SelectResult:
        """The result with what all its parts take, by one select that can take nothing else.

        Raises LengthConflict when some of that was trimmed meanwhile.
        """
        index = result.chunk_index
        chunks = np.unique(index[index >= 0])
        if (excess := asked.excess(len(chunks))) is not None:
            raise excess
        request, size = asked.request, session.settings.chunk_size
        stop = result.length if request.stop is None else request.stop
        rows = [chunks[at : at + MAX_TOP_K] for at in range(0, max(1, len(chunks)), MAX_TOP_K)]
        chunk_mask = np.zeros((len(rows), -(-stop // size)), dtype=np.bool_)
        for row, some in zip(chunk_mask, rows, strict=True):
            row[some] = True
        queries = np.zeros((len(rows), session.settings.dim), np.float32)
        select = replace(
            asked,
            request=replace(request, queries=queries, stop=stop, chunk_mask=chunk_mask),
            weights=Weights.fixed(self._key_space, MAX_TOP_K),
            length=result.length,
            num_truncated=result.num_truncated,
        )
        try:
            brought = await within(self._worker.submit(select, chunk_mask.size * session.settings.dim), *limit)
            assert isinstance(brought, SelectResult) and brought.taken is not None
            result = result._replace(taken=brought.taken, timing=result.timing.plus(brought.timing))
            is_whole = len(brought.taken.index) == len(chunks)
        except (Trimmed, Truncated):
            is_whole = False
        if not is_whole:
            raise LengthConflict(
                f"of the {len(chunks)} chunks that the queries take, some are trimmed by now: ask again",
                length=session.length,
            )
        return result
