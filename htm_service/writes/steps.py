"""The way of a step on the event loop: attend to the session as it is, then append; and what a repeated step answers.

Does not know HTTP, SQL or the device.
"""

from __future__ import annotations

from htm_service.errors import InvalidArgument
from htm_service.reads.attends import Attends
from htm_service.records import AppendRequest, AppendResult, AttendRequest, AttendResult
from htm_service.sessions.session import Session
from htm_service.writes.appends import Appends


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
        if appended.start < attended.length:  # only a repeated append begins before what was seen
            attended = await self._attends.attend_before(session, attend, appended.start)
        return attended, appended
