"""The demo from start to end: read, embed, serve, stream, kill, restart, check, ask, report.

Does not know how any of these is done; each is a module beside this one.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from htm_client import AsyncHTMClient
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from api.demo import report
from api.demo.agents import LIBRARY, Agent, Answers, ask_all, make_agents
from api.demo.corpus import Passage, read_corpus
from api.demo.embedder import Embedder, Floats, SentenceEmbedder, TfidfEmbedder
from api.demo.quality import Quality, measure
from api.demo.questions import QUESTIONS, Question
from api.demo.server_process import ServerProcess

NUM_SHARES = 16
RETRIES = 20
"""A killed server is back within seconds; the client's backoff ends at 5 s a try."""
LOAD_ROUNDS = 4
"""How often all questions are asked again to measure the rate."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """How the streaming went."""

    seconds: float
    num_appends: int
    num_tokens: int
    killed_at: int
    """Passages that were acknowledged when the server was killed."""


def run_demo(data: Path | None, embedder: str | None, keep: bool, port: int | None, limit: int | None) -> int:
    """Run it; 0 when nothing was lost and recall is as good as promised. Raises OSError when it cannot run."""
    console = Console()
    directory = data or Path(tempfile.mkdtemp(prefix="htm-demo-"))
    directory.mkdir(parents=True, exist_ok=True)
    console.print("[bold]1. A corpus that every machine has[/]: docstrings and comments of Python's standard library")
    began = time.perf_counter()
    passages = read_corpus(limit=limit)
    model: Embedder = make_embedder(embedder, passages)
    embeddings = model.embed([passage.embedded_text for passage in passages])
    console.print(f"   {len(passages):,} passages, embedded with {model.name} in {time.perf_counter() - began:.1f} s")
    server = ServerProcess(directory, directory / "server.log", port or 0)
    server.start()
    is_up = True
    try:
        console.print(f"[bold]2. A server of its own[/]: process {server.pid} at {server.url}, SQLite in {directory}")
        is_good = asyncio.run(_with_server(console, server, passages, embeddings, model))
        if keep:
            is_up = False
            console.print(
                f"\nThe server stays up: [bold]{server.url}/ui[/] shows its sessions. End it: kill {server.pid}"
            )
        else:
            is_up = False
            code = server.stop()
            console.print(f"   stopped with SIGTERM, exit code {code}")
            is_good = is_good and code == 0
    finally:
        if is_up:
            server.kill()
        if data is None and not keep:
            shutil.rmtree(directory, ignore_errors=True)
    return 0 if is_good else 1


def make_embedder(name: str | None, passages: Sequence[Passage]) -> Embedder:
    """The embedder that was asked for. Raises OSError when it is not installed."""
    if name is not None:
        return SentenceEmbedder(name)
    return TfidfEmbedder([passage.embedded_text for passage in passages])


async def _with_server(
    console: Console, server: ServerProcess, passages: Sequence[Passage], embeddings: Floats, model: Embedder
) -> bool:
    agents = make_agents(passages, embeddings, NUM_SHARES)
    async with AsyncHTMClient(server.url, retries=RETRIES) as client:
        console.print(f"[bold]3. {len(agents)} agents stream[/]: one the whole library, {NUM_SHARES} a share each")
        loaded = await _stream(console, client, server, agents)
        if loaded.killed_at:
            console.print(f"   killed with SIGKILL after {loaded.killed_at:,} passages, restarted on the same data")
        problems = [problem for agent in agents if (problem := await agent.check(client)) is not None]
        for problem in problems:
            console.print(f"   [red]lost[/]: {problem}")
        if not problems:
            console.print(f"   every one of {loaded.num_tokens:,} acknowledged passages read back, equal to the bit")

        console.print(f"[bold]4. They ask {len(QUESTIONS)} questions[/], each in the library and where its module is")
        queries = model.embed([question.text for question in QUESTIONS])
        asked = [(LIBRARY, query) for query in queries] + _in_shares(agents, QUESTIONS, queries)
        answers = await ask_all(client, asked)
        report.show_examples(console, QUESTIONS, answers)
        quality = _quality(QUESTIONS, queries, passages, embeddings, answers)
        shares = _quality_in_shares(agents, QUESTIONS, queries, answers)
        load = await ask_all(client, asked * LOAD_ROUNDS)
        report.show_summary(console, await client.info(), loaded, quality, shares, load)
    return not problems and quality.is_good


async def _stream(console: Console, client: AsyncHTMClient, server: ServerProcess, agents: list[Agent]) -> Loaded:
    """Stream all at once; kill the server half-way and start it again while the agents go on trying."""
    total = sum(len(agent.passages) for agent in agents)
    done, held, killed_at = 0, 0, 0
    half = asyncio.Event()
    columns = (TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("passages", total=total)

        def advance(number: int) -> None:
            nonlocal done
            done += number
            progress.update(task, advance=number)
            if done >= total / 2:
                half.set()

        async def crash() -> None:
            nonlocal killed_at
            await half.wait()
            if all(agent.num_appends == 0 for agent in agents):  # the data was there already
                return
            killed_at = sum(agent.acknowledged for agent in agents)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)

        began = time.perf_counter()
        await asyncio.gather(crash(), *(agent.stream(client, advance) for agent in agents))
        seconds = time.perf_counter() - began
    held = sum(agent.acknowledged for agent in agents)
    return Loaded(seconds, sum(agent.num_appends for agent in agents), held, killed_at)


def _home(agents: Sequence[Agent], question: Question) -> Agent:
    """The agent in whose share most passages of the question's modules are."""

    def count(agent: Agent) -> int:
        return sum(passage.module.split(".")[0] in question.modules for passage in agent.passages)

    return max(agents[1:], key=count)


def _in_shares(agents: Sequence[Agent], questions: Sequence[Question], queries: Floats) -> list[tuple[str, Floats]]:
    homes = (_home(agents, question) for question in questions)
    return [(agent.session, query) for agent, query in zip(homes, queries, strict=True)]


def _positions(answers: Answers, first: int, last: int) -> list[list[int]]:
    return [[token.position for token in row] for row in answers.recalled[first:last]]


def _quality(
    questions: Sequence[Question], queries: Floats, passages: Sequence[Passage], embeddings: Floats, answers: Answers
) -> Quality:
    return measure(questions, queries, passages, embeddings, _positions(answers, 0, len(questions)))


def _quality_in_shares(
    agents: Sequence[Agent], questions: Sequence[Question], queries: Floats, answers: Answers
) -> Quality:
    """The mean over the questions, each compared within its own share."""
    rows = _positions(answers, len(questions), 2 * len(questions))
    each = []
    for place, question in enumerate(questions):
        agent = _home(agents, question)
        each.append(measure([question], queries[place][None], agent.passages, agent.embeddings, [rows[place]]))
    return Quality(
        float(np.mean([quality.found for quality in each])),
        float(np.mean([quality.hit_rate for quality in each])),
        float(np.mean([quality.exact_hit_rate for quality in each])),
    )
