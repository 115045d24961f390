"""`htm-service export | import`: all sessions of a running server to a directory of files, and back.

A file is in its place when it is whole. What is there already with the same content is skipped, so either may be
stopped and begun again: the server says in the first bytes of an export, by checksums, what the rest would be.
Does not know: what is in a session's file, except its header.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Protocol

import typer

from api.commands.remote import LOCAL, Refused, Unreachable, ask, opened
from htm_service.version import __version__

if TYPE_CHECKING:  # needed only where someone looks
    from rich.progress import Progress

INDEX = "index.json"
SUFFIX = ".safetensors"
MEDIA_TYPE = "application/x-safetensors"
PIECE_BYTES = 1 << 20
SURVEY_S = 600.0
"""How long a server may read a session before it sends the first byte."""
MAX_HEADER_BYTES = 16 << 20

Url = Annotated[str, typer.Option(help="Where the server is; the key is HTM_API_KEY, or in HTM_API_KEY_FILE.")]
Namespace = Annotated[str | None, typer.Option(help="Whose sessions, with a key for all namespaces.")]
Prefix = Annotated[str, typer.Option(help="Only ids that begin so.")]
Label = Annotated[list[str] | None, typer.Option(help="Only with this label, key:value; repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no bar; there is none where stderr is no terminal.")]


class Readable(Protocol):
    """A file, or an answer."""

    def read(self, size: int, /) -> bytes:
        """At most so many bytes."""


@dataclass(slots=True)
class Tally:
    """What became of the sessions."""

    num_done: int = 0
    num_skipped: int = 0
    failures: list[str] = field(default_factory=list)

    def finish(self, verb: str) -> None:
        """Say it, on stdout, and what failed on stderr. Raises Exit with code 1 where something did."""
        for failure in self.failures:
            print(f"htm-service: {failure}", file=sys.stderr)
        print(f"{self.num_done} sessions {verb}, {self.num_skipped} were there, {len(self.failures)} failed")
        if self.failures:
            raise typer.Exit(1)


def export_all(
    directory: Annotated[Path, typer.Argument(help="Where the files go, made when missing: ID.safetensors each.")],
    namespace: Namespace = None,
    prefix: Prefix = "",
    label: Label = None,
    url: Url = LOCAL,
    quiet: Quiet = False,
) -> None:
    """Export all sessions to a directory, a file each, with an index. What is there as it is here is skipped."""
    directory.mkdir(parents=True, exist_ok=True)
    tally, sessions = Tally(), list(list_sessions(url, namespace, prefix, label or []))
    try:
        with progress("export", len(sessions), quiet) as bars:
            for session in sessions:
                bars.begin(session)
                with noted(tally, session):
                    if export_one(url, namespace, session, directory / f"{session}{SUFFIX}", bars.advance):
                        tally.num_done += 1
                    else:
                        tally.num_skipped += 1
    finally:
        write_index(directory)
    tally.finish("exported")


def import_all(
    directory: Annotated[Path, typer.Argument(help="Where `export` wrote files.")],
    namespace: Namespace = None,
    prefix: Prefix = "",
    url: Url = LOCAL,
    quiet: Quiet = False,
) -> None:
    """Import a directory's sessions. What is there with the same content is skipped, with another it is a failure."""
    tally = Tally()
    sessions = [session for session in indexed(directory) if session.startswith(prefix)]
    with progress("import", len(sessions), quiet) as bars:
        for session in sessions:
            bars.begin(session)
            with noted(tally, session):
                if import_one(url, namespace, session, directory / f"{session}{SUFFIX}", bars.advance):
                    tally.num_done += 1
                else:
                    tally.num_skipped += 1
    tally.finish("imported")


def list_sessions(url: str, namespace: str | None, prefix: str, labels: Sequence[str]) -> Iterator[str]:
    """The ids of all sessions, by id."""
    cursor: str | None = None
    while True:
        named = [("limit", "1000"), ("prefix", prefix), ("cursor", cursor or ""), *(("label", one) for one in labels)]
        query = urllib.parse.urlencode([(name, value) for name, value in named if value])
        page = ask(url, "GET", f"/v1/sessions?{query}", namespace=namespace)
        yield from (str(session["id"]) for session in page["sessions"])
        if (cursor := page["cursor"]) is None:
            return


def export_one(url: str, namespace: str | None, session: str, path: Path, advance: Callable[[int, int], None]) -> bool:
    """Write one session's file; False where it is there. Raises OSError."""
    with opened(url, "GET", place(session, "export"), namespace=namespace, timeout_s=SURVEY_S) as answer:
        size, head = int(answer.headers["Content-Length"] or -1), header_of(answer)
        if is_same(path, size, head):
            return False
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as file:
                num_done = file.write(head)
                while piece := answer.read(PIECE_BYTES):
                    num_done += file.write(piece)
                    advance(num_done, size)
                if num_done != size:
                    raise OSError(f"the export ends after {num_done} of {size} bytes")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return True


def import_one(url: str, namespace: str | None, session: str, path: Path, advance: Callable[[int, int], None]) -> bool:
    """Make one session of its file; False where it is there. Raises OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = header_of(file)
        try:
            with opened(url, "GET", place(session, "export"), namespace=namespace, timeout_s=SURVEY_S) as answer:
                if header_of(answer) == head:
                    return False
            raise OSError("there is a session of this id with another content")
        except Refused as refused:
            if refused.code not in ("session_not_found", "session_expired"):
                raise
        file.seek(0)
        headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(size)}
        body = pieces(file, size, advance)
        with opened(url, "PUT", place(session, "import"), body, headers, namespace, SURVEY_S) as answer:
            answer.read()
    return True


def pieces(file: IO[bytes], size: int, advance: Callable[[int, int], None]) -> Iterator[bytes]:
    """A file's bytes, and word of how many."""
    num_done = 0
    while piece := file.read(PIECE_BYTES):
        yield piece
        num_done += len(piece)
        advance(num_done, size)


def place(session: str, call: str) -> str:
    """The path of a call."""
    return f"/v1/sessions/{urllib.parse.quote(session, safe='')}/{call}"


def header_of(source: Readable) -> bytes:
    """The first bytes of a session's file, which tell it from all others. Raises OSError where it is none."""
    start = source.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > MAX_HEADER_BYTES:
        raise OSError("it is no session's file")
    head = start
    while len(head) < 8 + size:
        if not (part := source.read(8 + size - len(head))):
            raise OSError("it is no session's file: it ends in its header")
        head += part
    return head


def is_same(path: Path, size: int, head: bytes) -> bool:
    """Whether there is a file with this header, whole."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_size == size and header_of(file) == head
    return False


@contextlib.contextmanager
def noted(tally: Tally, session: str) -> Iterator[None]:
    """A session that fails is told of in the end; the others go on, unless the server itself cannot be reached."""
    try:
        yield
    except Unreachable:
        raise
    except Refused as error:
        if error.code in ("unauthenticated", "forbidden"):
            raise
        tally.failures.append(f"session {session}: {error}")
    except OSError as error:
        tally.failures.append(f"session {session}: {error.strerror or error}")


def write_index(directory: Path) -> None:
    """Say what is in a directory: each session, its file, its bytes and its checksums."""
    entries = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            with path.open("rb") as file:
                header = json.loads(header_of(file)[8:])
            params = json.loads(header["__metadata__"]["params"])
            told = {name: params[name] for name in ("first_position", "length", "checksums")}
        except (OSError, ValueError, TypeError, KeyError):  # someone else's
            continue
        entries.append({"id": path.name.removesuffix(SUFFIX), "file": path.name, "bytes": path.stat().st_size, **told})
    beside = directory / f".{INDEX}.{os.getpid()}.part"
    beside.write_text(
        json.dumps({"format": "htm-sessions", "version": 1, "by": __version__, "sessions": entries}, indent=1)
    )
    beside.replace(directory / INDEX)


def indexed(directory: Path) -> list[str]:
    """The sessions of a directory, by its index. Raises OSError where a file is not there, or not as it was."""
    try:
        told = json.loads((directory / INDEX).read_text())
        entries = [(str(entry["id"]), str(entry["file"]), int(entry["bytes"])) for entry in told["sessions"]]
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"{directory / INDEX} is not what `htm-service export` writes: {error!r}") from None
    for session, name, size in entries:
        if name != f"{session}{SUFFIX}" or "/" in name:
            raise OSError(f"{directory / INDEX} names the file {name!r} for session {session!r}")
        if not (path := directory / name).is_file() or path.stat().st_size != size:
            raise OSError(f"{path} is not there, or has not the {size} bytes that {INDEX} says")
    return [session for session, _, _ in entries]


class Bars:
    """How far it is: one bar, of the bytes of the session that is at work, which says the how manieth it is."""

    def __init__(self, verb: str, num_sessions: int, shown: Progress | None) -> None:
        self._verb = verb
        self._num_sessions = num_sessions
        self._num_begun = 0
        self._shown = shown
        self._task = None if shown is None else shown.add_task(verb, total=None)

    def begin(self, session: str) -> None:
        """The next session."""
        self._num_begun += 1
        if self._shown is not None and self._task is not None:
            text = f"{self._verb} {self._num_begun} of {self._num_sessions}: {session}"
            self._shown.update(self._task, description=text, completed=0, total=None)

    def advance(self, num: int, total: int) -> None:
        """So many of its bytes."""
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, completed=num, total=total)


@contextlib.contextmanager
def progress(verb: str, num_sessions: int, quiet: bool) -> Iterator[Bars]:
    """Bars, drawn where stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield Bars(verb, num_sessions, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        yield Bars(verb, num_sessions, shown)
