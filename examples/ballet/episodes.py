"""Episodes of many environments in lock-step, as Gymnasium's vector of environments gives them.

Shapes: S environments, T steps before the choice. Does not know agents: nothing that they do before the choice matters.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

from examples.ballet.environment import DANCE_STEPS, MAX_WAIT, NAMED, Ballet

NUM_ENVIRONMENTS = 64


class Episodes(NamedTuple):
    """What was seen: `danced` [S, T, O] before the choice, the dance that was `named` [S, dances], and who may be
    picked, `dancers` [S, looks] bool. `right` [S] is the answer, for those who learn from it.
    """

    danced: Tensor
    named: Tensor
    dancers: Tensor
    right: Tensor


class Stage:
    """Environments side by side, which all wait equally long before the first dance."""

    def __init__(self, seed: int, num_environments: int = NUM_ENVIRONMENTS) -> None:
        self._random = np.random.default_rng(seed)
        self._num_environments = num_environments

    def episodes(self, num_dancers: int, delay: int) -> tuple[gymnasium.vector.SyncVectorEnv, Episodes]:
        """One episode of each, up to the choice: the environments are left there, for an action."""
        wait = int(self._random.integers(MAX_WAIT + 1))
        make = partial(Ballet, num_dancers, delay, wait)
        environments = gymnasium.vector.SyncVectorEnv([make] * self._num_environments)
        observation, info = environments.reset(seed=int(self._random.integers(2**31)))
        seen = [observation.copy()]
        nothing = np.zeros(self._num_environments, np.int64)
        for _ in range(wait + num_dancers * (DANCE_STEPS + delay)):
            seen.append(environments.step(nothing)[0].copy())
        steps = torch.from_numpy(np.stack(seen, axis=1))
        episodes = Episodes(
            steps[:, :-1],
            steps[:, -1, NAMED],
            torch.from_numpy(np.stack(info["dancers"]).astype(bool)),
            torch.from_numpy(np.asarray(info["right"], np.int64)),
        )
        return environments, episodes
