"""What became of a call that was sent: the server's answer, or none.

Does not know sockets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Response:
    """An answer as it came, of any status; names of headers are in small letters."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class NoResponse(Exception):
    """There is no answer.

    `may_be_done` tells whether the server can have carried the call out all the same, `is_hopeless` whether the same
    call would fail each time.
    """

    def __init__(self, reason: str, *, may_be_done: bool, is_hopeless: bool = False) -> None:
        super().__init__(reason)
        self.may_be_done = may_be_done
        self.is_hopeless = is_hopeless
