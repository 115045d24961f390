"""The way of a step on the event loop: attend to the session as it is, then append; and what a repeated step answers.

Does not know HTTP, SQL or the device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from htm_service.errors import HTMError, InvalidArgument, LengthConflict
from htm_service.reads.attends import Attends
from htm_service.records import AppendRequest, AppendResult, AttendRequest, AttendResult, StepRequest, StepResult
from htm_service.sessions.session import Session
from htm_service.writes.appends import Appends, only_repeat


class Steps:
    """See the head of this module."""

    def __init__(self, attends: Attends, appends: Appends) -> None:
        self._attends = attends
        self._appends = appends

    async def step(
        self, session: Session, attend: AttendRequest, append: AppendRequest
    ) -> tuple[AttendResult, AppendResult]:
        """Attend, then append; both requests are checked.

        A step repeated with its idempotency key attends to the session as it was before the first one's append.
        """
        session.check_sound()
        try:
            attended = await self._attends.attend(session, attend)
        except InvalidArgument:  # a repeated step's masks are as long as the session was
            first = await self._appends.first_append(session, append)
            if first is None:
                raise
            return await self._attends.attend_before(session, attend, first.start), first
        appended = await self._appends.append(session, append)
        if appended.is_repeated and appended.start < attended.length:
            attended = await self._attends.attend_before(session, attend, appended.start)
        return attended, appended

    async def step_all(
        self, wanted: Sequence[tuple[Session, StepRequest]], *, num_items: int
    ) -> list[StepResult | Exception]:
        """Attend to several sessions as they are, then append to them: each is what `step` is, all in as few batches.

        An item whose attend fails appends nothing. `num_items` share the answer, as in `Attends.attend_all`.
        """
        attends = [(session, request.attend) for session, request in wanted]
        appends = [(session, request.append) for session, request in wanted]
        preparing = asyncio.create_task(self._appends.prepare_all(appends))  # while the device attends
        try:
            answered = await self._attends.answer_all(attends, num_items=num_items)
        except BaseException:
            preparing.cancel()
            raise
        seen, prepared = answered.outcomes, await preparing
        outcomes: dict[int, StepResult | Exception] = {}
        places: list[int] = []
        for place, attended in enumerate(seen):
            if isinstance(attended, AttendResult):
                places.append(place)
            elif _may_be_repeated(attended, appends[place][1]):
                prepared[place] = only_repeat(prepared[place])
                places.append(place)
            else:
                outcomes[place] = attended
        write_all = self._appends.write_all([appends[place] for place in places], [prepared[place] for place in places])
        writing = asyncio.create_task(write_all)
        try:
            await asyncio.sleep(0)  # so that the writes are on their way
            self._attends.account(answered)
        finally:
            written = await writing
        for place, appended in zip(places, written, strict=True):
            attended = seen[place]
            if isinstance(attended, Exception):
                is_first = isinstance(appended, LengthConflict)  # of a step that was not made before
                outcomes[place] = attended if is_first else await self._again(*wanted[place], appended)
            elif isinstance(appended, Exception):
                outcomes[place] = appended
            elif appended.is_repeated and appended.start < attended.length:
                outcomes[place] = await self._again(*wanted[place], appended)
            else:
                outcomes[place] = StepResult(attended, appended)
        return [outcomes[place] for place in range(len(wanted))]

    async def _again(
        self, session: Session, request: StepRequest, first: AppendResult | Exception
    ) -> StepResult | Exception:
        """What a repeated step answers, whose append answered `first`."""
        if isinstance(first, Exception):
            return first
        try:
            return StepResult(await self._attends.attend_before(session, request.attend, first.start), first)
        except HTMError as error:
            return error


def _may_be_repeated(error: Exception, append: AppendRequest) -> bool:
    """Whether an attend may have failed because its step was made before, so that its masks are of another length."""
    return isinstance(error, InvalidArgument) and append.idempotency_key is not None
