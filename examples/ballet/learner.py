"""Learning to pick: cross-entropy of the choice at the end of an episode, on 2 to 4 dancers.

The encoder learns first, by itself. No agent is told which chunk or step matters. The paper's agents learn by
reinforcement; that the right dancer is told, not only whether the one picked was right, is a shortcut here.
Does not know what the agents are measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from htm_client.torch import RemoteHTMAttention
from torch import Tensor, nn
from torch.nn import functional

from examples.ballet.agents import Agent, Encoder
from examples.ballet.episodes import Episodes, Stage
from examples.ballet.memory import Memory

TRAINED_ON = (2, 3, 4)
"""Dancers."""
DELAY = 16
LEARNING_RATE = 4e-3

Read = Callable[[Tensor, Episodes], Tensor]
"""From queries [S, D] and what was danced to what the head reads [S, width]."""


def train_encoder(encoder: Encoder, stage: Stage, iterations: Iterator[int], num_iterations: int) -> None:
    """Teach it to tell what it sees."""
    step = _Optimiser(encoder, num_iterations)
    for _ in iterations:
        episodes = _next(stage, 4)
        step(encoder.loss(episodes.danced[:8]))


def train(agent: Agent, read: Read, stage: Stage, iterations: Iterator[int], num_iterations: int) -> float:
    """Teach an agent to pick; the share of right choices in the last tenth."""
    step, right = _Optimiser(agent, num_iterations), list[float]()
    for _, num_dancers in zip(iterations, cycle(TRAINED_ON), strict=False):
        episodes = _next(stage, num_dancers)
        logits = agent.pick(read(agent.ask(episodes.named), episodes), episodes.dancers)
        step(functional.cross_entropy(logits, episodes.right))
        right.append(float((logits.argmax(dim=1) == episodes.right).float().mean()))
    last = right[-max(1, len(right) // 10) :]
    return sum(last) / len(last)


def remote_reader(agent: Agent, memory: Memory, attention: RemoteHTMAttention) -> Read:
    """Through the server: what was danced goes into its sessions, and the learner's own weights read them there."""

    def read(queries: Tensor, episodes: Episodes) -> Tensor:
        sessions = memory.begin(len(queries))
        with torch.no_grad():
            memory.append(sessions, agent.encoder(episodes.danced))
        found: Tensor = attention(queries[:, None], sessions)
        return found[:, 0]

    return read


def pushed_reader(agent: Agent, memory: Memory) -> Read:
    """Through the server, which attends by itself with the weights that were pushed."""

    def read(queries: Tensor, episodes: Episodes) -> Tensor:
        sessions = memory.begin(len(queries))
        memory.append(sessions, agent.encoder(episodes.danced))
        return memory.attend(sessions, queries)

    return read


def local_reader(agent: Agent) -> Read:
    """Within the process, with gradients through everything."""
    return lambda queries, episodes: agent.reader(queries, agent.encoder(episodes.danced))


def _next(stage: Stage, num_dancers: int) -> Episodes:
    environments, episodes = stage.episodes(num_dancers, DELAY)
    environments.close()
    return episodes


class _Optimiser:
    """Adam under a schedule of so many steps."""

    def __init__(self, module: nn.Module, num_iterations: int) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._adam = torch.optim.Adam(self._parameters, LEARNING_RATE)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._adam, LEARNING_RATE, total_steps=max(2, num_iterations), pct_start=0.2
        )

    def __call__(self, loss: Tensor) -> None:
        """One step down."""
        self._adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._schedule.step()
