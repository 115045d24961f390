"""Writes of one turn go out together, in order, and none is lost."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from api.transport import MAX_GATHERED_BYTES, GatheringProtocol, GatheringTransport


class Noted(asyncio.Transport):
    """Notes what is written together."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[list[bytes]] = []
        self.is_closed = False

    def writelines(self, parts: Any) -> None:
        assert not self.is_closed
        self.written.append(list(parts))

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


@pytest.fixture
async def noted() -> Noted:
    return Noted()


async def test_writes_of_one_turn_go_out_together(noted: Noted) -> None:
    transport = GatheringTransport(noted, asyncio.get_running_loop())
    transport.write(b"head")
    transport.write(b"body")
    assert noted.written == []
    await asyncio.sleep(0)
    transport.write(b"next")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert noted.written == [[b"head", b"body"], [b"next"]]


async def test_much_is_written_at_once(noted: Noted) -> None:
    """So that the transport can hold the sender back in the middle of a long answer."""
    transport = GatheringTransport(noted, asyncio.get_running_loop())
    large = bytes(MAX_GATHERED_BYTES)
    for part in (b"head", large, b"tail"):
        transport.write(part)
    assert noted.written == [[b"head", large]]
    await asyncio.sleep(0)
    assert noted.written == [[b"head", large], [b"tail"]]


async def test_what_is_written_before_closing_goes_out(noted: Noted) -> None:
    transport = GatheringTransport(noted, asyncio.get_running_loop())
    transport.write(b"last words")
    transport.close()
    await asyncio.sleep(0)
    assert noted.written == [[b"last words"]] and transport.is_closing()


async def test_an_answer_of_the_server_is_one_piece(noted: Noted) -> None:
    """Head and body of uvicorn's own protocol."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"body"})

    config = uvicorn.Config(cast(Any, app), http=GatheringProtocol, access_log=False)
    config.load()
    protocol = GatheringProtocol(config, ServerState(), {})
    protocol.connection_made(noted)
    protocol.data_received(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    for _ in range(3):
        await asyncio.sleep(0)
    (parts,) = noted.written
    assert parts[0].startswith(b"HTTP/1.1 200") and parts[1] == b"body"
    protocol.connection_lost(None)
