"""The way of a select on the event loop: which chunks queries in key space take, with their keys and tokens.

    select -> the device thread's queue, as an attend, in parts where it needs them -> what they take, each chunk once

Does not know HTTP, nor weights: whoever asks computes attention elsewhere. It is no recall.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from htm_service.attention.model import RetrievalModel
from htm_service.config import MAX_TOP_K
from htm_service.errors import LengthConflict, SessionDamaged
from htm_service.reads.attends import Attends
from htm_service.reads.runner import Select
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
        top_k = request.top_k
        if top_k is None:
            top_k = (await self._attends.weights_of(session, session.settings.model, request)).top_k
        weights = Weights.fixed(self._key_space, top_k)
        asked = Select(session.resident, weights, request, keys=keys, tokens=tokens)
        try:
            limit = self._attends.deadline_of(request)  # one for all that is asked of the device
            result = await self._attends.compute(session, asked, limit)
            assert isinstance(result, SelectResult)
            if result.taken is None and (keys or tokens):  # its parts only said what they take
                return await self._bring(session, asked, result, limit)
            return result
        except SessionDamaged as error:
            session.damage = error.detail
            raise

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
        future = self._worker.submit(select, chunk_mask.size * session.settings.dim)
        try:
            brought = await within(future, *limit)
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
