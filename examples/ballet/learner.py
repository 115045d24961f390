"""Learning to pick: cross-entropy of the choice at the end of an episode, on 2 to 4 dancers.

The encoder learns first, by itself, and then stays as it is: all agents read the same tokens. No agent is told which
chunk or step matters. The paper's agents learn by reinforcement; that the right dancer is told, not only whether the
one picked was right, is a shortcut here. Does not know what the agents are measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
RATE = 4e-3
"""Of the encoder and of the agent with HTM."""
RATES = (RATE, RATE / 2, RATE / 4, RATE / 8)
"""Of the others: each learns at all of these, and the one that is right most often counts. RATE was chosen for HTM, so
that another agent that fails at it says little: in 400 updates full attention learned nothing there."""

Read = Callable[[Tensor, Tensor], Tensor]
"""From queries [S, D] and tokens [S, T, D] to what the head reads [S, width]."""


class Pupil:
    """An agent that learns at a rate, in a given number of updates."""

    def __init__(self, agent: Agent, read: Read, rate: float, num_updates: int) -> None:
        self.agent, self.read, self.rate = agent, read, rate
        self._step = _Optimiser(agent, rate, num_updates)
        self._shares: list[float] = []

    def learn(self, tokens: Tensor, episodes: Episodes) -> None:
        """One update."""
        logits = self.agent.pick(self.read(self.agent.ask(episodes.named), tokens), episodes.dancers)
        self._step(functional.cross_entropy(logits, episodes.right))
        self._shares.append(float((logits.argmax(dim=1) == episodes.right).float().mean()))

    @property
    def share(self) -> float:
        """Of right choices in the last tenth of the updates."""
        last = self._shares[-max(1, len(self._shares) // 10) :]
        return sum(last) / len(last)


def train_encoder(encoder: Encoder, stage: Stage, iterations: Iterator[int], num_iterations: int) -> None:
    """Teach it to tell what it sees."""
    step = _Optimiser(encoder, RATE, num_iterations)
    for _ in iterations:
        episodes = _next(stage, 4)
        step(encoder.loss(episodes.danced[:8]))


def train(encoder: Encoder, pupils: Sequence[Pupil], stage: Stage, iterations: Iterator[int]) -> None:
    """Teach agents to pick, all from the same episodes."""
    for _, num_dancers in zip(iterations, cycle(TRAINED_ON), strict=False):
        episodes = _next(stage, num_dancers)
        with torch.no_grad():
            tokens = encoder(episodes.danced)
        for pupil in pupils:
            pupil.learn(tokens, episodes)


def remote_reader(memory: Memory, attention: RemoteHTMAttention) -> Read:
    """Through the server: tokens go into its sessions, and the learner's own weights read them there."""

    def read(queries: Tensor, tokens: Tensor) -> Tensor:
        sessions = memory.begin(len(queries))
        memory.append(sessions, tokens)
        found: Tensor = attention(queries[:, None], sessions)
        return found[:, 0]

    return read


def pushed_reader(memory: Memory) -> Read:
    """Through the server, which attends by itself with the weights that were pushed."""

    def read(queries: Tensor, tokens: Tensor) -> Tensor:
        sessions = memory.begin(len(queries))
        memory.append(sessions, tokens)
        return memory.attend(sessions, queries)

    return read


def _next(stage: Stage, num_dancers: int) -> Episodes:
    environments, episodes = stage.episodes(num_dancers, DELAY)
    environments.close()
    return episodes


class _Optimiser:
    """Adam under a schedule of so many steps."""

    def __init__(self, module: nn.Module, rate: float, num_iterations: int) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._adam = torch.optim.Adam(self._parameters, rate)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._adam, rate, total_steps=max(2, num_iterations), pct_start=0.2
        )

    def __call__(self, loss: Tensor) -> None:
        """One step down."""
        self._adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._schedule.step()
