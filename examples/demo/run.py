"""The demo from start to end: read, embed, serve, stream, kill, restart, check, ask, report.

Does not know how any of these is done; each is a module beside this one.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
from htm_client import AsyncHTMClient, HTMClientError
from rich.console import Console

from examples.demo import report
from examples.demo.agents import LIBRARY, Agent, Answers, ask, make_agents, search
from examples.demo.corpus import Passage, read_corpus
from examples.demo.embedder import Embedder, Floats, SentenceEmbedder, TfidfEmbedder
from examples.demo.quality import Quality, measure
from examples.demo.questions import QUESTIONS, Question
from examples.demo.server_process import ServerProcess
from examples.demo.streaming import stream

NUM_SHARES = 16
RETRIES = 20
"""A killed server is back within seconds; the client's backoff ends at 5 s a try."""
MIN_PASSAGES = 200
"""Below that there is nothing to ask about."""


def run_demo(data: Path | None, embedder: str | None, keep: bool, port: int | None, limit: int | None) -> int:
    """Run it; 0 when nothing was lost and recall is as good as promised. Raises OSError when it cannot run."""
    console = report.make_console()
    directory = data or Path(tempfile.mkdtemp(prefix="htm-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    server = ServerProcess(directory, directory / "server.log", port or 0)
    is_kept = False
    try:
        console.print("[bold]1. A corpus that every machine has[/]: docstrings and comments of Python's own library")
        passages, model, embeddings = _embed(console, embedder, limit)
        server.start()
        console.print(f"[bold]2. A server of its own[/]: process {server.pid} at {server.url}, SQLite in {directory}")
        try:
            is_good = asyncio.run(_with_server(console, server, passages, embeddings, model))
        except HTMClientError as error:  # also what an agent sees whose session was lost: no such session, or shorter
            raise OSError(f"an agent's request failed: {error}") from error
        if keep:
            is_kept = True
            console.print(
                f"\nThe server stays up: [bold]{server.url}/ui[/] shows its sessions. End it: kill {server.pid}"
            )
        else:
            code = server.stop()
            console.print(f"   stopped with SIGTERM, exit code {code}")
            is_good = is_good and code == 0
    finally:
        if not is_kept:
            if server.is_running:
                server.kill()
            if data is None:
                shutil.rmtree(directory, ignore_errors=True)
    return 0 if is_good else 1


def _embed(console: Console, name: str | None, limit: int | None) -> tuple[list[Passage], Embedder, Floats]:
    """The corpus and its embeddings [n, D]. Raises OSError when it is too small or the embedder is not installed."""
    began = time.perf_counter()
    passages = read_corpus(limit=limit)
    if len(passages) < MIN_PASSAGES:
        raise OSError(f"the demo needs at least {MIN_PASSAGES} passages, and there are {len(passages)}")
    texts = [passage.embedded_text for passage in passages]
    model: Embedder = TfidfEmbedder(texts) if name is None else SentenceEmbedder(name)
    embeddings = model.embed(texts)
    console.print(f"   {len(passages):,} passages, embedded with {model.name} in {time.perf_counter() - began:.1f} s")
    if limit is not None:
        console.print(
            "   a part of the corpus: most questions have no answer in it, and exact search finds none either"
        )
    return passages, model, embeddings


async def _with_server(
    console: Console, server: ServerProcess, passages: Sequence[Passage], embeddings: Floats, model: Embedder
) -> bool:
    """Everything that needs the server; whether nothing was lost and the quality is as promised."""
    agents = make_agents(passages, embeddings, NUM_SHARES)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncHTMClient(server.url, retries=RETRIES)) for _ in agents]
        console.print(f"[bold]3. {len(agents)} agents stream[/]: one the whole library, {NUM_SHARES} a share each")
        loaded = await stream(console, server, agents, clients)
        report.show_loaded(console, loaded)

        console.print(
            f"\n[bold]4. Each agent asks {len(QUESTIONS)} questions in the library[/], all agents at the same time, "
            "and those that its own session can answer best there too"
        )
        queries = model.embed([question.text for question in QUESTIONS])
        homes = [_home(agents, question) for question in QUESTIONS]
        asked = [
            [(LIBRARY, question.text, query) for question, query in zip(QUESTIONS, queries, strict=True)]
            + [
                (agent.session, question.text, query)
                for question, query, home in zip(QUESTIONS, queries, homes, strict=True)
                if home is agent
            ]
            for agent in agents
        ]
        began = time.perf_counter()
        with report.progress(console, "attends", sum(map(len, asked))) as advance:
            answers = await asyncio.gather(
                *(ask(client, mine, advance) for client, mine in zip(clients, asked, strict=True))
            )
        seconds = time.perf_counter() - began
        report.show_examples(console, QUESTIONS, answers[0])
        console.print(
            "\n[bold]5. Each looks the same questions up by search[/]: all passages, not those of a few chunks"
        )
        began = time.perf_counter()
        with report.progress(console, "searches", sum(map(len, asked))) as advance:
            found = await asyncio.gather(
                *(search(client, mine, advance) for client, mine in zip(clients, asked, strict=True))
            )
        searched = report.Searched(
            sum(map(len, found)) / (time.perf_counter() - began),
            _quality(queries, passages, embeddings, found),
        )
        quality = _quality(queries, passages, embeddings, [answer.positions for answer in answers])
        shares = _quality_in_shares(agents, homes, queries, answers)
        info = await clients[0].info()
        report.show_summary(console, info, loaded, quality, shares, report.Load.of(answers, seconds), searched)
    return not loaded.losses and quality.is_good and searched.is_good


def _home(agents: Sequence[Agent], question: Question) -> Agent:
    """The agent in whose share most passages of the question's modules are."""
    return max(agents[1:], key=lambda agent: sum(passage.package in question.modules for passage in agent.passages))


def _quality(
    queries: Floats, passages: Sequence[Passage], embeddings: Floats, answers: Sequence[Sequence[Sequence[int]]]
) -> Quality:
    """Of the positions that all agents were answered for each question in the library."""
    rows = [row for answer in answers for row in answer[: len(QUESTIONS)]]
    return measure(QUESTIONS * len(answers), np.tile(queries, (len(answers), 1)), passages, embeddings, rows)


def _quality_in_shares(
    agents: Sequence[Agent], homes: Sequence[Agent], queries: Floats, answers: Sequence[Answers]
) -> Quality:
    """The mean over the questions, each compared within the share it was asked in."""
    each = []
    for agent, answer in zip(agents, answers, strict=True):
        mine = [place for place, home in enumerate(homes) if home is agent]
        for place, row in zip(mine, answer.positions[len(QUESTIONS) :], strict=True):
            each.append(
                measure([QUESTIONS[place]], queries[place : place + 1], agent.passages, agent.embeddings, [row])
            )
    return Quality(
        float(np.mean([quality.found for quality in each])),
        float(np.mean([quality.hit_rate for quality in each])),
        float(np.mean([quality.exact_hit_rate for quality in each])),
    )
