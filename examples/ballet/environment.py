"""Ballet: dancers dance one after another, with pauses; then one dance is named, and its dancer is to be picked.

After the task of Lampinen et al. 2021 (arXiv 2105.14039, section 4.1), with symbols instead of pixels. One step does
not tell a dance: all are made of the same eight moves.
Does not know agents.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

NUM_LOOKS = 8
"""Dancers that there are; some of them take part in an episode."""
NUM_DANCES = 13
NUM_MOVES = 8
DANCE_STEPS = 16
MAX_WAIT = 32

LOOK = slice(0, NUM_LOOKS)
MOVE = slice(LOOK.stop, LOOK.stop + NUM_MOVES)
NAMED = slice(MOVE.stop, MOVE.stop + NUM_DANCES)
OBSERVATION = NAMED.stop
"""Numbers of an observation: who dances, the move, and at the end the dance that is named."""

Floats = npt.NDArray[np.float32]

DANCES = np.random.default_rng(0).integers(NUM_MOVES, size=(NUM_DANCES, DANCE_STEPS))
"""[dances, steps]: the move of each step."""


class Ballet(gymnasium.Env[Floats, np.int64]):
    """An episode: a wait, `num_dancers` times a dance and `delay` steps of nothing, then a choice, 1 if it is right.

    `wait` is how many steps pass before the first dance, up to MAX_WAIT if None. Only the last action counts;
    `info["dancers"]` [looks] says who takes part, so that chance is 1 / num_dancers, and `info["right"]` who is to be
    picked.
    """

    def __init__(self, num_dancers: int = 2, delay: int = 16, wait: int | None = None) -> None:
        if not 2 <= num_dancers <= NUM_LOOKS:
            raise ValueError(f"num_dancers is {num_dancers}; it must be 2 to {NUM_LOOKS}")
        self.num_dancers, self.delay, self.wait = num_dancers, delay, wait
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (OBSERVATION,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(NUM_LOOKS)
        self._episode = np.zeros((1, OBSERVATION), np.float32)
        self._right, self._at = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Floats, dict[str, Any]]:
        """Other dancers, other dances."""
        super().reset(seed=seed)
        looks = self.np_random.permutation(NUM_LOOKS)[: self.num_dancers]
        dances = self.np_random.permutation(NUM_DANCES)[: self.num_dancers]
        wait = int(self.np_random.integers(MAX_WAIT + 1)) if self.wait is None else self.wait
        num_steps = wait + self.num_dancers * (DANCE_STEPS + self.delay) + 1
        self._episode = np.zeros((num_steps, OBSERVATION), np.float32)
        for turn, (look, dance) in enumerate(zip(looks, dances, strict=True)):
            steps = wait + turn * (DANCE_STEPS + self.delay) + np.arange(DANCE_STEPS)
            self._episode[steps, LOOK.start + look] = 1
            self._episode[steps, MOVE.start + DANCES[dance]] = 1
        asked = int(self.np_random.integers(self.num_dancers))
        self._episode[-1, NAMED.start + dances[asked]] = 1
        self._right, self._at = int(looks[asked]), 0
        return self._episode[0].copy(), {"dancers": np.isin(np.arange(NUM_LOOKS), looks), "right": self._right}

    def step(self, action: np.int64) -> tuple[Floats, float, bool, bool, dict[str, Any]]:
        """The next step; the last action ends the episode."""
        is_last = self._at == len(self._episode) - 1
        reward = float(is_last and int(action) == self._right)
        self._at += not is_last
        return self._episode[self._at].copy(), reward, is_last, False, {}
