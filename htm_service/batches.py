"""What is asked of many sessions at once, in lock-step: each item is what a call of its own would be.

Items whose session there is, and whose request is sound, go on together; each of the others has its own error.
Does not know what is asked. Runs on the event loop, which gets its turn between portions of items.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from htm_service.errors import HTMError, without_frames
from htm_service.records import SessionKey
from htm_service.sessions.session import Session

R = TypeVar("R")
T = TypeVar("T")

AT_ONCE = 128
"""Items that are looked at between two turns of the loop: about a millisecond."""


async def each(
    items: Sequence[tuple[SessionKey, R]],
    known: Callable[[SessionKey], Session | None],
    find: Callable[[SessionKey, R], Awaitable[Session]],
    check: Callable[[Session, R], R],
    act: Callable[[Sequence[tuple[Session, R]]], Awaitable[Sequence[T | Exception]]],
) -> list[T | HTMError]:
    """An outcome for each item: what `act` made of those that `find` and `check` let pass, or an error of its own.

    `find` is asked for sessions that are not `known`, which need not be waited for.
    """
    outcomes: dict[int, T | HTMError] = {}
    ready: list[tuple[Session, R]] = []
    places: list[int] = []
    for first in range(0, len(items), AT_ONCE):
        some = items[first : first + AT_ONCE]
        found: list[Session | BaseException | None] = [known(key) for key, _ in some]
        new = [at for at, session in enumerate(found) if session is None]
        looked_up = await asyncio.gather(*(find(*some[at]) for at in new), return_exceptions=True)
        for at, result in zip(new, looked_up, strict=True):
            found[at] = result
        for place, (session, (_, request)) in enumerate(zip(found, some, strict=True), first):
            try:
                if not isinstance(session, Session):
                    assert session is not None
                    raise session
                ready.append((session, check(session, request)))
                places.append(place)
            except HTMError as error:
                outcomes[place] = error
        await asyncio.sleep(0)
    if ready:
        for place, outcome in zip(places, await act(ready), strict=True):
            outcomes[place] = _unexpected(outcome) if isinstance(outcome, Exception) else outcome
    in_order = [outcomes[place] for place in range(len(items))]
    return [without_frames(outcome) if isinstance(outcome, HTMError) else outcome for outcome in in_order]


def _unexpected(error: Exception) -> HTMError:
    """An error that may be told; another one goes to the log."""
    if isinstance(error, HTMError):
        return error
    logging.getLogger(__name__).error("an item of a batch failed", exc_info=error)
    return HTMError("unexpected error; the server's log has it")
