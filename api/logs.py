"""The server's log: a line for each record, on stderr, as text or as JSON. Does not know: who logs what."""

from __future__ import annotations

import logging
import sys
import textwrap
from contextvars import ContextVar
from datetime import UTC, datetime

import orjson

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"

REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="")
"""Of the request that the running task answers."""


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


class Objects(logging.Formatter):
    """A record is one line, a JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": encodable(record.getMessage()),
        }
        if request_id := REQUEST_ID.get():
            content["request_id"] = request_id
        if record.exc_info:
            content["exception"] = encodable(self.formatException(record.exc_info))
        return orjson.dumps(content).decode()


def escaped(text: str) -> str:
    """The text with whatever is no printable character written as Python writes it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def encodable(text: str) -> str:
    """The text with what no UTF-8 can hold, halves of characters, written as Python writes it."""
    return text.encode(errors="backslashreplace").decode()


def configure(level: str, form: str) -> None:
    """Log records of at least this level, by name, to stderr; `form` is `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Objects() if form == "json" else Lines(LINE))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    # It warns of what strangers send: without a key they could fill the log, some lines for each line of theirs.
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.levelno != logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each plug-in that it loads
