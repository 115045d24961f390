"""How often an agent picks the right dancer, with confidence intervals, also where it was never trained.

Does not know how agents remember.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import torch

from examples.ballet.agents import Agent
from examples.ballet.episodes import Stage
from examples.ballet.learner import Read

SETTINGS = ((2, 16), (4, 16), (8, 16), (8, 48), (8, 160), (8, 480))
"""Dancers and delay; the last two delays are ten times those of the paper."""
CHOSEN_ON = (4, 16)
"""Where the rates of learning are compared: as in training, in other episodes than those measured."""
Z = 1.96


@dataclass(frozen=True, slots=True)
class Score:
    """`num_right` of `num_episodes`, at so many dancers and such a delay."""

    num_dancers: int
    delay: int
    num_right: int
    num_episodes: int

    @property
    def share(self) -> float:
        """Of right choices."""
        return self.num_right / self.num_episodes

    @property
    def chance(self) -> float:
        """What picking any of the dancers gives."""
        return 1 / self.num_dancers

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share is with 95% confidence (Wilson)."""
        n, p = self.num_episodes, self.share
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return middle - half, middle + half


@dataclass(frozen=True, slots=True)
class Result:
    """An agent's `scores`, one for each setting, in how many `updates` it learned, the `parameters` of its reader, and
    what each of its `rates` of learning gave where they are compared.
    """

    scores: list[Score]
    updates: int
    parameters: int
    rates: dict[str, float]

    @property
    def rate(self) -> str:
        """The best of the rates, of equal ones the highest: what the scores are of."""
        return max(self.rates, key=lambda rate: (self.rates[rate], float(rate)))


def evaluate(agent: Agent, read: Read, stage: Stage, num_dancers: int, delay: int, batches: Iterator[int]) -> Score:
    """Let it act in the environments; what counts is their reward."""
    num_right = num_episodes = 0
    with torch.no_grad():
        for _ in batches:
            environments, episodes = stage.episodes(num_dancers, delay)
            read_out = read(agent.ask(episodes.named), agent.encoder(episodes.danced))
            choice = agent.pick(read_out, episodes.dancers).argmax(dim=1)
            _, rewards, *_ = environments.step(choice.numpy())
            environments.close()
            num_right += int(rewards.sum())
            num_episodes += len(rewards)
    return Score(num_dancers, delay, num_right, num_episodes)
