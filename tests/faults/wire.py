"""Requests over sockets of their own, so that a client can go away in the middle of one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `status` is 0 where the connection ended without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Caller:
    """One connection with one request on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def send(
        cls,
        port: int,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        kind: str = "application/json",
        headers: str = "",
        part: float = 1.0,
    ) -> Caller:
        """Send a request, or the first `part` of its body."""
        caller = cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}"
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        caller.writer.write(head.encode() + body[: int(len(body) * part)])
        await caller.writer.drain()
        return caller

    async def answer(self, seconds: float = 60) -> Answer:
        """The answer; the connection is closed."""
        try:
            return await asyncio.wait_for(self._answer(), seconds)
        except (asyncio.IncompleteReadError, ConnectionError):
            return Answer(0)
        finally:
            self.writer.close()

    async def _answer(self) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        return Answer(
            int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers.get("content-length", 0)))
        )

    def vanish(self) -> None:
        """Go away as a process does that is killed."""
        self.writer.transport.abort()


async def ask(port: int, method: str, path: str, content: Any = None, **options: Any) -> Answer:
    """Send JSON and wait for the answer."""
    body = b"" if content is None else json.dumps(content).encode()
    return await (await Caller.send(port, method, path, body, **options)).answer()


async def make_session(port: int, name: str, tokens: Floats, **settings: Any) -> None:
    """A session with these tokens [n, D]."""
    made = await ask(port, "PUT", f"/v1/sessions/{name}", {"dim": tokens.shape[1], **settings})
    assert made.status == 201, made
    if len(tokens):
        added = await ask(port, "POST", f"/v1/sessions/{name}/memories", {"embeddings": tokens.tolist()})
        assert added.status == 200, added


async def send_attend(port: int, name: str, queries: Floats) -> Caller:
    """Begin an attend with `queries` [Q, D]."""
    body = json.dumps({"queries": queries.tolist()}).encode()
    return await Caller.send(port, "POST", f"/v1/sessions/{name}/attend", body)


async def send_append(port: int, name: str, tokens: Floats) -> Caller:
    """Begin an append of `tokens` [T, D]."""
    body = json.dumps({"embeddings": tokens.tolist()}).encode()
    return await Caller.send(port, "POST", f"/v1/sessions/{name}/memories", body)
