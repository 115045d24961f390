"""The agents stream at the same time; half-way the server is killed and started again, and what it holds is compared.

Does not know questions, nor what is printed beyond the progress.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from htm_client import AsyncHTMClient
from rich.console import Console

from examples.demo import report
from examples.demo.agents import Agent
from examples.demo.server_process import ServerProcess


@dataclass(frozen=True, slots=True)
class Crash:
    """What was acknowledged when the server was killed, how long it was away, and what was gone after that."""

    num_tokens: int
    down_seconds: float
    check_seconds: float
    losses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Loaded:
    """How the streaming went; `seconds` leaves out the kill, the restart and the check after it."""

    seconds: float
    num_appends: int
    num_tokens: int
    crash: Crash
    final_losses: tuple[str, ...]

    @property
    def losses(self) -> tuple[str, ...]:
        """Sentences on everything that was not there as it had been sent."""
        return self.crash.losses + self.final_losses


async def stream(
    console: Console, server: ServerProcess, agents: Sequence[Agent], clients: Sequence[AsyncHTMClient]
) -> Loaded:
    """Stream everything, with a kill half-way, and read everything back."""
    total = sum(len(agent.passages) for agent in agents)
    num_done = 0
    half, gate = asyncio.Event(), asyncio.Event()
    gate.set()
    began = time.perf_counter()
    with report.progress(console, "passages", total) as advance_bar:

        def advance(number: int) -> None:
            nonlocal num_done
            num_done += number
            advance_bar(number)
            if num_done >= total / 2:
                half.set()

        # A task group, because when one agent or the restart fails, the others would go on trying for minutes.
        try:
            async with asyncio.TaskGroup() as tasks:
                for agent, client in zip(agents, clients, strict=True):
                    tasks.create_task(agent.stream(client, gate, advance))
                crashing = tasks.create_task(_crash(server, agents, clients, half, gate))
        except ExceptionGroup as group:
            raise group.exceptions[0] from group
    crash = crashing.result()
    seconds = time.perf_counter() - began - crash.down_seconds - crash.check_seconds
    final = [
        await agent.find_loss(client, agent.acknowledged, 0) for agent, client in zip(agents, clients, strict=True)
    ]
    return Loaded(
        seconds=seconds,
        num_appends=sum(agent.num_appends for agent in agents),
        num_tokens=sum(agent.acknowledged for agent in agents),
        crash=crash,
        final_losses=tuple(loss for loss in final if loss is not None),
    )


async def _crash(
    server: ServerProcess,
    agents: Sequence[Agent],
    clients: Sequence[AsyncHTMClient],
    half: asyncio.Event,
    gate: asyncio.Event,
) -> Crash:
    """Wait until `half`, kill, restart, and compare each session with what was acknowledged at the kill."""
    await half.wait()
    began = time.perf_counter()
    await asyncio.to_thread(server.kill)
    # From here on an agent ends the append that it has in flight, which its client sends again, and begins no other.
    gate.clear()
    held = [(agent.acknowledged, agent.next_part) for agent in agents]
    await asyncio.to_thread(server.start)
    down_seconds = time.perf_counter() - began
    began = time.perf_counter()
    losses = [
        await agent.find_loss(client, acknowledged, in_flight)
        for agent, client, (acknowledged, in_flight) in zip(agents, clients, held, strict=True)
        if acknowledged
    ]
    gate.set()
    return Crash(
        num_tokens=sum(acknowledged for acknowledged, _ in held),
        down_seconds=down_seconds,
        check_seconds=time.perf_counter() - began,
        losses=tuple(loss for loss in losses if loss is not None),
    )
