"""What does not go over the client's own connections: a transport of httpx that the caller gives, and `:memory:`.

Such a transport belongs to the process, and the async one to the event loop, that it is first used in.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping

import httpx

from htm_client.calls import Call, Source
from htm_client.errors import UnreadableAnswer
from htm_client.transport.base import NoResponse, Response
from htm_client.transport.message import Address

NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)
WHOSE = "a client with a transport of its own, as ':memory:' has,"


class HttpxTransport:
    """For the sync client."""

    def __init__(self, address: Address, timeout: float | None, transport: httpx.BaseTransport) -> None:
        self._process = os.getpid()
        self._http = httpx.Client(
            base_url=address.url, headers=address.authorization, timeout=timeout, transport=transport, trust_env=False
        )

    def send(self, call: Call) -> Response:
        """The answer. Raises NoResponse, UnreadableAnswer, and RuntimeError in another process."""
        _check_process(self._process)
        content = call.content if call.source is None else call.source.pieces()
        try:
            with self._http.stream(
                call.method, call.path, content=content, headers=_headers(call), params=call.query
            ) as answer:
                if call.sink is None or answer.status_code != 200:
                    answer.read()
                    return _read(answer)
                call.sink.begin(_length(answer))
                for part in answer.iter_bytes():
                    call.sink.write(part)
                return Response(answer.status_code, dict(answer.headers), b"")
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _translated(call, error) from error

    def close(self) -> None:
        """Close the transport, unless another process made it. Safe to call twice."""
        if self._process == os.getpid():
            self._http.close()


class AsyncHttpxTransport:
    """For the async client."""

    def __init__(self, address: Address, timeout: float | None, transport: httpx.AsyncBaseTransport) -> None:
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http = httpx.AsyncClient(
            base_url=address.url, headers=address.authorization, timeout=timeout, transport=transport, trust_env=False
        )

    async def send(self, call: Call) -> Response:
        """The answer. Raises NoResponse, UnreadableAnswer, and RuntimeError in another process or event loop."""
        _check_process(self._process)
        self._loop = self._loop or asyncio.get_running_loop()
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError(
                f"{WHOSE} belongs to the event loop of its first call, and this is another: "
                "make a client in each asyncio.run, or all calls in one"
            )
        content = call.content if call.source is None else _pieces(call.source)
        try:
            async with self._http.stream(
                call.method, call.path, content=content, headers=_headers(call), params=call.query
            ) as answer:
                if call.sink is None or answer.status_code != 200:
                    await answer.aread()
                    return _read(answer)
                call.sink.begin(_length(answer))
                async for part in answer.aiter_bytes():
                    call.sink.write(part)
                return Response(answer.status_code, dict(answer.headers), b"")
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _translated(call, error) from error

    async def close(self) -> None:
        """Close the transport, where that is possible: in its own process and event loop. Safe to call twice."""
        if self._process == os.getpid() and self._loop in (None, asyncio.get_running_loop()):
            await self._http.aclose()


def _check_process(process: int) -> None:
    if process != os.getpid():
        raise RuntimeError(
            f"{WHOSE} belongs to the process that made it, {process}, and this is process {os.getpid()}: "
            "make a client in each"
        )


def _headers(call: Call) -> Mapping[str, str]:
    return call.headers if call.source is None else {**call.headers, "Content-Length": str(call.source.num_bytes)}


async def _pieces(source: Source) -> AsyncIterator[bytes]:
    with contextlib.closing(source.pieces()) as pieces:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece


def _length(answer: httpx.Response) -> int | None:
    length = answer.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _read(answer: httpx.Response) -> Response:
    headers = {name: value for name, value in answer.headers.items() if name != "content-encoding"}  # httpx undid it
    return Response(answer.status_code, headers, answer.content)


def _translated(call: Call, error: httpx.TransportError | httpx.DecodingError) -> Exception:
    if isinstance(error, httpx.DecodingError):
        return UnreadableAnswer(f"{call.method} {call.path}: the answer is compressed and broken: {error}")
    return NoResponse(repr(error), may_be_done=not isinstance(error, NOT_SENT), is_hopeless=isinstance(error, HOPELESS))
