"""The server's log: a line for each record, on stderr. Does not know: who logs what."""

from __future__ import annotations

import logging
import sys
import textwrap

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Lines(logging.Formatter):
    """A record is one line, and what follows it, a traceback, is indented.

    Ids, paths and values of clients stand in messages and exceptions. None of them can begin a line that looks like
    a record, or send a terminal its control codes.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 the base class's name
        """The line."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: logging._SysExcInfoType) -> str:  # noqa: N802 the base class's name
        """The traceback, with an exception's own text in it."""
        lines = super().formatException(ei).splitlines()
        return textwrap.indent("\n".join(map(escaped, lines)), "  ")


def escaped(text: str) -> str:
    """The text with whatever is no printable character written as Python writes it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def configure(level: str) -> None:
    """Log records of at least this level, by name, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each plug-in that it loads
