"""`:memory:`: how the app in this process starts and stops. What it answers is tested in test_client.py."""

import asyncio
import sys
import threading
from types import ModuleType

import numpy as np
import pytest
from htm_client import AsyncHTMClient, HTMClient


def app_threads() -> int:
    return sum(thread.name == "htm-in-process" for thread in threading.enumerate())


@pytest.mark.parametrize("stranger", [False, True], ids=["missing", "a stranger's api"])
def test_without_the_server_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, stranger: bool) -> None:
    """The sync client left a thread behind; a package `api` that is not the server's passed for it."""
    monkeypatch.setitem(sys.modules, "api.app", ModuleType("api.app") if stranger else None)
    before = app_threads()
    for make in (HTMClient, AsyncHTMClient):
        with pytest.raises(RuntimeError, match=r"pip install htm-client\[server\]"):
            make(":memory:")
    assert app_threads() == before


def test_it_stops_with_the_client() -> None:
    before = app_threads()
    with HTMClient(":memory:") as client:
        client.live()
        client.ready()
        assert app_threads() == before + 1
    client.close()
    assert app_threads() == before


def test_a_client_that_was_never_used_closes() -> None:
    HTMClient(":memory:").close()
    asyncio.run(AsyncHTMClient(":memory:").close())


def test_clients_share_nothing() -> None:
    with HTMClient(":memory:") as one, HTMClient(":memory:") as other:
        one.create_session("s", dim=3)
        assert [info.id for info in one.sessions()] == ["s"]
        assert list(other.sessions()) == []


async def test_many_calls_at_once_start_it_once() -> None:
    async with AsyncHTMClient(":memory:") as client:
        await asyncio.gather(*(client.create_session(f"s{i}", dim=3) for i in range(7)))
        assert [info.id async for info in client.sessions()] == [f"s{i}" for i in range(7)]


async def test_a_cancelled_first_call_does_not_stop_the_start() -> None:
    async with AsyncHTMClient(":memory:") as client:
        first = asyncio.create_task(client.live())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await client.live()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_what_keeps_it_from_starting_is_raised(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTM_MODELS_DIR", "/nowhere/at/all")
    if kind == "sync":
        with HTMClient(":memory:") as client, pytest.raises(Exception, match="/nowhere/at/all"):
            client.live()
        return

    async def call() -> None:
        async with AsyncHTMClient(":memory:") as client:
            await client.live()

    with pytest.raises(Exception, match="/nowhere/at/all"):
        asyncio.run(call())


def test_threads_may_share_a_client() -> None:
    with HTMClient(":memory:") as client:
        client.create_session("s", dim=3)
        threads = [threading.Thread(target=client.append, args=("s", np.eye(3))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.session("s").length == 15
