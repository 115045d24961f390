"""The async client. All calls retry what is worth retrying and raise `htm_client.errors`.

Does not know how calls are written or answers read: see `requests.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import httpx

from htm_client.batches import Errors
from htm_client.calls import Call
from htm_client.errors import NotFound
from htm_client.files import FileSink, FileSource, bar
from htm_client.in_process import ADDRESS, AsyncApp
from htm_client.options import (
    AppendConditions,
    AppendOptions,
    AttendOptions,
    BatchAppendConditions,
    BatchAppendOptions,
    BatchAttendOptions,
    BatchPayloads,
    BatchSearchOptions,
    BatchSelectOptions,
    ExplainOptions,
    ModelOptions,
    Payloads,
    RecallOptions,
    SearchAllOptions,
    SearchOptions,
    SelectOptions,
    SessionChanges,
    SessionOptions,
)
from htm_client.requests import Request, Requests
from htm_client.results import (
    Appended,
    Attended,
    BatchAppended,
    BatchAttended,
    BatchFound,
    BatchSelected,
    BatchStepped,
    BatchTruncated,
    Chunk,
    ChunkDetail,
    Explained,
    Found,
    Memories,
    Model,
    Recall,
    Recalled,
    Selected,
    SessionInfo,
    Stepped,
    Truncated,
)
from htm_client.retry import RETRIES, Outcome, Retry, finish
from htm_client.transport.adapter import WHOSE, AsyncHttpxTransport
from htm_client.transport.asynchronous import AsyncTransport
from htm_client.transport.base import NoResponse
from htm_client.transport.message import Address

T = TypeVar("T")


class AsyncHTMClient:
    """A connection pool to one server; `":memory:"` runs the server's app in this process.

    `binary` sends and asks for safetensors; otherwise JSON with base64 tensors. Use it as a context manager,
    or call `close`.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = RETRIES,
        binary: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._make_again = partial(
            AsyncHTMClient, base_url, api_key=api_key, timeout=timeout, retries=retries, binary=binary, sleep=sleep
        )
        address = Address.of("http://localhost" if base_url == ADDRESS else base_url, api_key)
        if base_url == ADDRESS:
            transport = AsyncApp()
        self._transport = (
            AsyncTransport(address, timeout) if transport is None else AsyncHttpxTransport(address, timeout, transport)
        )
        self._requests = Requests(binary=binary)
        self._retry = Retry(retries)
        self._sleep = sleep

    def __reduce__(self) -> tuple[Callable[[], AsyncHTMClient], tuple[()]]:
        """Pickled, it becomes a client with connections of its own. Raises TypeError where those cannot be made."""
        if isinstance(self._transport, AsyncHttpxTransport):
            raise TypeError(f"{WHOSE} cannot be pickled: make a client in each process")
        return self._make_again, ()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close."""
        await self.close()

    async def close(self) -> None:
        """Close all connections. Safe to call twice."""
        await self._transport.close()

    # --- sessions ---

    async def create_session(self, session: str | None = None, **options: Unpack[SessionOptions]) -> SessionInfo:
        """Create a session, or confirm that it exists with these settings; without an id the server makes one."""
        return await self._send(self._requests.create_session(session, options))

    async def sessions(
        self, *, label: Mapping[str, str] | None = None, prefix: str | None = None
    ) -> AsyncIterator[SessionInfo]:
        """All sessions that have these labels and this prefix, by id."""
        cursor: str | None = None
        while True:
            page = await self._send(self._requests.sessions(label, prefix, cursor))
            for item in page.items:
                yield item
            if (cursor := page.cursor) is None:
                return

    async def session(self, session: str) -> SessionInfo:
        """Inspect a session."""
        return await self._send(self._requests.session(session))

    async def update_session(self, session: str, **changes: Unpack[SessionChanges]) -> SessionInfo:
        """Change labels, ttl_s or model."""
        return await self._send(self._requests.update_session(session, changes))

    async def delete_session(self, session: str, *, missing_ok: bool = False) -> None:
        """Delete a session and its tokens; with `missing_ok` it need not be there."""
        with contextlib.suppress(*[NotFound] if missing_ok else []):
            await self._send(self._requests.delete_session(session))

    async def fork(
        self,
        session: str,
        id: str | None = None,
        length: int | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> SessionInfo:
        """Begin a new session with the first `length` tokens of this one (all if left out), without copying them."""
        return await self._send(self._requests.fork(session, id, length, labels))

    async def truncate(self, session: str, length: int, if_length: int | None = None) -> Truncated:
        """Forget the tokens from position `length` on, at once and for good; positions are given again."""
        return await self._send(self._requests.truncate(session, length, if_length))

    async def reset(self, sessions: str | Iterable[str]) -> None:
        """Forget all tokens of these sessions: the next episode begins. Settings, models and ids stay."""
        for request in self._requests.resets(sessions):
            await self._send(request)

    async def delete_sessions(self, *, label: Mapping[str, str] | None = None, prefix: str | None = None) -> int:
        """Delete all sessions that have these labels and this prefix, one of which must be given; how many."""
        return await self._send(self._requests.delete_sessions(label, prefix))

    # --- tokens in, answers out ---

    async def append(
        self, session: str, embeddings: Any, payloads: Payloads | None = None, **options: Unpack[AppendConditions]
    ) -> Appended:
        """Add tokens `embeddings` [T, D] or [D], and T payloads: on disk and visible when this returns."""
        return await self._send(self._requests.append(session, embeddings, payloads, options))

    async def attend(self, session: str, queries: Any, **options: Unpack[AttendOptions]) -> Attended:
        """HTM attention for `queries` [Q, D] or [D]."""
        return await self._send(self._requests.attend(session, queries, options))

    async def explain(self, session: str, query: Any, **options: Unpack[ExplainOptions]) -> Explained:
        """How `query` [D] ranks the chunks it sees, and which it would take; it does not count as a recall."""
        return await self._send(self._requests.explain(session, query, options))

    async def select(self, session: str, queries: Any, **options: Unpack[SelectOptions]) -> Selected:
        """Which chunks `queries` [Q, D] in key space take, with their keys and tokens; it is no recall."""
        return await self._send(self._requests.select(session, queries, options))

    async def search(
        self,
        session: str,
        query: Any,
        n: int = 10,
        *,
        embeddings: bool = False,
        payloads: bool = True,
        **options: Unpack[SearchOptions],
    ) -> list[Found]:
        """The n tokens of a session that score best against `query` [D], with their payloads."""
        one = self._requests.search(session, query, n, embeddings=embeddings, payloads=payloads, options=options)
        return await self._send(one)

    async def search_many(
        self,
        session: str,
        queries: Any,
        n: int = 10,
        *,
        embeddings: bool = False,
        payloads: bool = True,
        **options: Unpack[SearchOptions],
    ) -> list[list[Found]]:
        """The same for `queries` [Q, D], a list for each."""
        many = self._requests.search_many(
            session, queries, n, embeddings=embeddings, payloads=payloads, options=options
        )
        return await self._send(many)

    async def search_all(
        self,
        queries: Any,
        n: int = 10,
        *,
        sessions: Sequence[str] | None = None,
        label: Mapping[str, str] | None = None,
        prefix: str | None = None,
        embeddings: bool = False,
        payloads: bool = True,
        **options: Unpack[SearchAllOptions],
    ) -> list[list[Found]]:
        """The n tokens that score best against each of `queries` [Q, D] or [D], of all these sessions together: those
        named, or those that have these labels and this prefix.
        """
        many = self._requests.search_all(
            queries, n, sessions, label, prefix, embeddings=embeddings, payloads=payloads, options=options
        )
        return await self._send(many)

    async def step(
        self,
        session: str,
        queries: Any,
        embeddings: Any,
        *,
        attend: AttendOptions | None = None,
        append: AppendOptions | None = None,
    ) -> Stepped:
        """One round trip per agent step: attend to the memory as it is, then append."""
        return await self._send(self._requests.step(session, queries, embeddings, attend or {}, append or {}))

    async def recall(self, session: str, query: Any, n: int = 5, **options: Unpack[RecallOptions]) -> list[Recalled]:
        """The n most similar tokens in the chunks that `query` [D] recalls, with their payloads."""
        return await self._send(self._requests.recall(session, query, n, options))

    async def recall_many(
        self, session: str, queries: Any, n: int = 5, **options: Unpack[RecallOptions]
    ) -> list[list[Recalled]]:
        """The same for `queries` [Q, D], a list for each."""
        return await self._send(self._requests.recall_many(session, queries, n, options))

    async def read(
        self, session: str, start: int = 0, stop: int | None = None, *, embeddings: bool = True, payloads: bool = True
    ) -> Memories:
        """Read tokens start .. stop-1 back."""
        return await self._send(self._requests.read(session, start, stop, embeddings=embeddings, payloads=payloads))

    # --- many sessions in one request ---

    async def batch_append(
        self,
        sessions: Sequence[str],
        embeddings: Any,
        payloads: BatchPayloads | None = None,
        *,
        errors: Errors = "raise",
        **options: Unpack[BatchAppendConditions],
    ) -> BatchAppended:
        """Add tokens `embeddings` [S, T, D] or [S, D] to each of S sessions, of which the first `num_tokens` [S] count.

        Items that fail raise BatchFailed, which has the others' results, or with `errors="return"` are in the result.
        """
        return await self._send(self._requests.batch_append(sessions, embeddings, payloads, errors, options))

    async def batch_attend(
        self,
        sessions: Sequence[str],
        queries: Any,
        *,
        errors: Errors = "raise",
        **options: Unpack[BatchAttendOptions],
    ) -> BatchAttended:
        """HTM attention for `queries` [S, Q, D] or [S, D], those of each session. `errors` as in `batch_append`."""
        return await self._send(self._requests.batch_attend(sessions, queries, errors, options))

    async def batch_search(
        self,
        sessions: Sequence[str],
        queries: Any,
        n: int = 10,
        *,
        embeddings: bool = False,
        payloads: bool = True,
        errors: Errors = "raise",
        **options: Unpack[BatchSearchOptions],
    ) -> BatchFound:
        """The n tokens of each session that score best against its `queries` [S, Q, D] or [S, D]."""
        many = self._requests.batch_search(
            sessions, queries, n, embeddings=embeddings, payloads=payloads, errors=errors, options=options
        )
        return await self._send(many)

    async def batch_step(
        self,
        sessions: Sequence[str],
        queries: Any,
        embeddings: Any,
        *,
        attend: BatchAttendOptions | None = None,
        append: BatchAppendOptions | None = None,
        errors: Errors = "raise",
    ) -> BatchStepped:
        """A step of many environments at once: attend to each session as it is, then append to it."""
        steps = self._requests.batch_step(sessions, queries, embeddings, attend or {}, append or {}, errors)
        return await self._send(steps)

    async def batch_select(
        self,
        sessions: Sequence[str],
        queries: Any,
        *,
        errors: Errors = "raise",
        **options: Unpack[BatchSelectOptions],
    ) -> BatchSelected:
        """Which chunks `queries` [S, Q, D] or [S, D] in key space take, each of its session's, and what these hold."""
        return await self._send(self._requests.batch_select(sessions, queries, errors, options))

    async def batch_truncate(
        self,
        sessions: Sequence[str],
        length: Any = 0,
        if_length: Iterable[Any] | None = None,
        *,
        errors: Errors = "raise",
    ) -> BatchTruncated:
        """Forget the tokens of many sessions from position `length` on, one for all or [S]; `if_length` [S]."""
        return await self._send(self._requests.batch_truncate(sessions, length, if_length, errors))

    # --- whole sessions ---

    async def export(self, session: str, path: str | os.PathLike[str], *, progress: bool = True) -> Path:
        """Write a session with everything in it into a safetensors file, which is there when it is whole; its path.

        In constant memory. A bar shows how far it is where stderr is a terminal and rich is installed.
        Raises FileFailed.
        """
        with bar(f"export {session}", progress) as advance, FileSink(Path(path), advance) as sink:
            await self._send(self._requests.export(session, sink))
            return await asyncio.to_thread(sink.keep)

    async def import_(self, session: str, path: str | os.PathLike[str], *, progress: bool = True) -> SessionInfo:
        """Make a session of the file that `export` wrote, here or for another server: all of it or nothing.

        In constant memory, with a bar as above. Raises SessionConflict where there is a session of this id, FileFailed.
        """
        with bar(f"import {session}", progress) as advance:
            return await self._send(self._requests.import_(session, FileSource(Path(path), advance)))

    # --- inspection ---

    async def chunks(self, session: str, *, keys: bool = False) -> AsyncIterator[Chunk]:
        """All chunks of a session, in order."""
        cursor: str | None = None
        while True:
            page = await self._send(self._requests.chunks(session, cursor, keys=keys))
            for item in page.items:
                yield item
            if (cursor := page.cursor) is None:
                return

    async def chunk(self, session: str, index: int, *, embeddings: bool = False, key: bool = False) -> ChunkDetail:
        """One chunk with its tokens' payloads."""
        return await self._send(self._requests.chunk(session, index, embeddings=embeddings, key=key))

    async def recalls(self, session: str, limit: int = 20) -> list[Recall]:
        """The last recalls of a session, newest first."""
        return await self._send(self._requests.recalls(session, limit))

    # --- models ---

    async def models(self) -> list[Model]:
        """The models that can be named, and those that cannot be served, with the reason."""
        return await self._send(self._requests.models())

    async def model(self, name: str) -> Model:
        """One of them."""
        return await self._send(self._requests.model(name))

    async def put_model(self, name: str, source: Any, **options: Unpack[ModelOptions]) -> Model:
        """Have a name stand for these weights from the next batch on; attends go on meanwhile.

        `source` is an HTMAttention or HTMBlock (ours or htm-pytorch's), a state dict, or the path of a file.
        """
        return await self._send(self._requests.put_model(name, source, options))

    async def delete_model(self, name: str, *, if_match: str | None = None) -> None:
        """Delete a model that no session names."""
        return await self._send(self._requests.delete_model(name, if_match))

    # --- the server ---

    async def info(self) -> dict[str, Any]:
        """Version, device, limits and totals of the server."""
        return await self._send(self._requests.info())

    async def live(self) -> None:
        """Return when the server's process answers."""
        await self._send(self._requests.live())

    async def ready(self) -> None:
        """Return when the server takes requests; raises what keeps it from that."""
        await self._send(self._requests.ready())

    # --- sending ---

    async def _send(self, request: Request[T]) -> T:
        began, attempt = time.monotonic(), 0
        while True:
            outcome = await self._attempt(request.call)
            delay_s = self._retry.delay_s(attempt, request.call, outcome, time.monotonic() - began)
            if delay_s is None:
                return finish(request, attempt, outcome)
            await self._sleep(delay_s)
            attempt += 1

    async def _attempt(self, call: Call) -> Outcome:
        try:
            return await self._transport.send(call)
        except NoResponse as error:
            return error
