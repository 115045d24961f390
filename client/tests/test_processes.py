"""Clients that go into another process or event loop, with a real server: each gets its own answers there.

What forks runs in an interpreter of its own, which has no threads of this one's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from htm_client import AsyncHTMClient, HTMClient

from tests.served.forked import ForkedServer

ROOT = Path(__file__).parents[2]
DIM = 3


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = ForkedServer(tmp_path_factory.mktemp("server"), program="api.cli")
    server.start()
    yield server.url
    server.close()


def run_program(program: str, *arguments: str) -> str:
    """What a program prints that runs in an interpreter of its own, where warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "client")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


FORKS = """
    import os, sys
    from htm_client import HTMClient

    def in_children(work, num=2):
        children = []
        for number in range(num):
            if (child := os.fork()) == 0:
                try:
                    work(number)
                    os._exit(0)
                except BaseException as error:
                    print(repr(error), flush=True)
                    os._exit(1)
            children.append(child)
        return [os.waitpid(child, 0)[1] for child in children]
"""


def test_forks_have_connections_of_their_own(url: str) -> None:
    """Both children asked over the parent's connection, and each got what the other had asked for, with status 200."""
    program = (
        FORKS
        + """
    client = HTMClient(sys.argv[1])
    for name in ("fork-0", "fork-1", "fork-parent"):
        client.create_session(name, dim=3)
    def work(number):
        for turn in range(200):
            assert client.session(f"fork-{number}").id == f"fork-{number}"
            assert client.append(f"fork-{number}", [1, 0, number]).length == turn + 1
    assert in_children(work) == [0, 0]
    assert client.session("fork-parent").length == 0 and client.session("fork-1").length == 200
    client.close()
    """
    )
    run_program(program, url)


def test_a_fork_of_a_fork_while_threads_use_the_client(url: str) -> None:
    """A thread that holds the client's lock is not there in the fork."""
    program = (
        FORKS
        + """
    import threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, since Python 3.12
    client = HTMClient(sys.argv[1])
    client.create_session("threads", dim=3)
    is_over = threading.Event()
    def ask():
        while not is_over.is_set():
            assert client.session("threads").id == "threads"
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    def work(number):
        assert client.session("threads").id == "threads"
        assert in_children(lambda _: client.session("threads"), 1) == [0]
    assert in_children(work, 20) == [0] * 20
    is_over.set()
    for thread in threads:
        thread.join()
    client.close()
    """
    )
    run_program(program, url)


def test_async_clients_of_forks(url: str) -> None:
    program = (
        FORKS
        + """
    import asyncio
    from htm_client import AsyncHTMClient
    client = AsyncHTMClient(sys.argv[1])
    async def create():
        for name in ("async-0", "async-1", "async-parent"):
            await client.create_session(name, dim=3)
    async def ask(number):
        found = await asyncio.gather(*(client.session(f"async-{number}") for _ in range(100)))
        assert {info.id for info in found} == {f"async-{number}"}
    asyncio.run(create())
    assert in_children(lambda number: asyncio.run(ask(number))) == [0, 0]
    async def fork_within():
        await ask(0)
        assert in_children(lambda number: asyncio.run(ask(number))) == [0, 0]
        await ask(1)
    asyncio.run(fork_within())
    """
    )
    run_program(program, url)


def test_the_server_in_memory_is_not_there_in_a_fork() -> None:
    """It hung: the thread that ran it was not there."""
    program = (
        FORKS
        + """
    import warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    with HTMClient(":memory:") as client:
        client.create_session("s", dim=3)
        def work(number):
            with client:
                client.session("s")
        assert in_children(work, 1) == [256]
        assert client.session("s").id == "s"
    """
    )
    assert "belongs to the process that made it" in run_program(program)


def test_a_pickled_client_works_in_another_process(url: str) -> None:
    """`cannot pickle '_thread.RLock' object`."""
    with HTMClient(url, timeout=17, binary=False) as client:
        names = [f"pickled-{number}" for number in range(4)]
        for name in names:
            client.create_session(name, dim=DIM)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            assert [info.id for info in pool.map(client.session, names)] == names


def test_a_pickled_async_client_works(url: str) -> None:
    async def use(client: AsyncHTMClient) -> str:
        async with client:
            return (await client.create_session("unpickled", dim=DIM)).id

    assert asyncio.run(use(pickle.loads(pickle.dumps(AsyncHTMClient(url))))) == "unpickled"


def test_what_cannot_be_pickled_says_so() -> None:
    with HTMClient(":memory:") as client, pytest.raises(TypeError, match="make a client in each process"):
        pickle.dumps(client)
    with pytest.raises(TypeError, match="make a client in each process"):
        pickle.dumps(AsyncHTMClient(":memory:"))
    transport = httpx.MockTransport(lambda _: httpx.Response(200))
    with HTMClient(transport=transport) as client, pytest.raises(TypeError, match="make a client in each process"):
        pickle.dumps(client)


def test_an_async_client_in_two_event_loops(url: str) -> None:
    """`RuntimeError: Event loop is closed`, from inside of anyio. And what the first loop opened was never closed."""
    client = AsyncHTMClient(url)

    async def use(start: int) -> None:
        lengths = await asyncio.gather(*(client.append("loops", np.eye(DIM)) for _ in range(5)))
        assert max(appended.length for appended in lengths) == start + 5 * DIM

    asyncio.run(client.create_session("loops", dim=DIM))
    asyncio.run(use(0))
    asyncio.run(use(15))
    asyncio.run(client.close())
    with pytest.raises(RuntimeError, match="the client is closed"):
        asyncio.run(use(30))


def test_an_async_client_in_two_event_loops_at_once(url: str) -> None:
    client = AsyncHTMClient(url)

    async def use(name: str) -> None:
        await client.create_session(name, dim=DIM)
        for _ in range(50):
            assert (await client.session(name)).id == name

    async def both() -> None:
        await asyncio.gather(use("here"), asyncio.to_thread(asyncio.run, use("there")))
        await client.close()

    asyncio.run(both())


def test_the_server_in_memory_belongs_to_one_event_loop() -> None:
    client = AsyncHTMClient(":memory:")
    asyncio.run(client.create_session("s", dim=DIM))
    with pytest.raises(RuntimeError, match=r"make a client in each asyncio\.run, or all calls in one"):
        asyncio.run(client.session("s"))
    asyncio.run(client.close())
