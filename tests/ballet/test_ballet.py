"""The Ballet example: its environment, a short run of it, and the weights that it ships with, on a real server."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from rich.console import Console

from examples.ballet.__main__ import HTM, WEIGHTS, Ballet
from examples.ballet.agents import CHUNK_SIZE, DIM, LOCAL
from examples.ballet.environment import DANCES, LOOK, MOVE, NAMED
from examples.ballet.environment import Ballet as Environment
from examples.ballet.episodes import Stage
from examples.ballet.evaluation import Score
from examples.ballet.learner import RATES
from examples.ballet.memory import Memory

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's process finds the packages as this one does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "client")]))


def test_the_environment_is_one_of_gymnasium() -> None:
    check_env(Environment(num_dancers=3, delay=2, wait=1), skip_render_check=True)
    with pytest.raises(ValueError, match="num_dancers is 9; it must be 2 to 8"):
        Environment(num_dancers=9)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_seen_tells_who_is_right(seed: int) -> None:
    environment = Environment(num_dancers=4, delay=3, wait=2)
    observation, info = environment.reset(seed=seed)
    seen, done, reward = [observation], False, 0.0
    while not done:
        named = observation[NAMED]
        observation, reward, done, _, _ = environment.step(np.int64(info["right"] if named.any() else 0))
        seen.append(observation)
    assert reward == 1.0 and len(seen) == 2 + 4 * (16 + 3) + 2
    (dance,) = np.flatnonzero(named)
    steps = [step for step in seen if step[LOOK.start + info["right"]]]
    assert [int(step[MOVE].argmax()) for step in steps] == DANCES[dance].tolist()
    assert info["dancers"].sum() == 4 and info["dancers"][info["right"]]
    _, again = environment.reset(seed=seed)
    assert again["right"] == info["right"]
    for _ in range(len(seen) - 1):
        _, reward, done, _, _ = environment.step(np.int64((again["right"] + 1) % 8))
    assert done and reward == 0.0


def test_environments_are_in_lock_step() -> None:
    environments, episodes = Stage(3, num_environments=5).episodes(num_dancers=2, delay=4)
    assert environments.num_envs == 5 and episodes.danced.shape[0] == 5 and (episodes.danced.shape[1] - 40) in range(33)
    assert (episodes.named.sum(dim=1) == 1).all() and episodes.dancers.gather(1, episodes.right[:, None]).all()
    _, rewards, ended, *_ = environments.step(episodes.right.numpy())
    environments.close()
    assert ended.all() and rewards.tolist() == [1.0] * 5


def test_a_short_run_of_everything() -> None:
    with Memory(DIM, CHUNK_SIZE) as memory:
        results = Ballet(memory, Console(quiet=True), scale=0.01).run()
    assert list(results) == [HTM, *LOCAL]
    assert all(score.num_episodes == 64 for result in results.values() for score in result.scores)
    assert all(len(results[name].rates) == len(RATES) for name in LOCAL)


def test_the_weights_that_are_here_pick_right_on_a_server() -> None:
    """Eight dancers, which they were not trained on; chance is 1 in 8."""
    with Memory(DIM, CHUNK_SIZE) as memory:
        ballet = Ballet(memory, Console(quiet=True), scale=0.01)
        ballet.settings = ((8, 16),)
        (score,) = ballet.run([HTM], WEIGHTS)[HTM].scores
        assert [model.name for model in memory.client.models()] == ["ballet", "retrieval"]
    assert score.interval[0] > 0.75


def test_intervals() -> None:
    assert Score(8, 16, 0, 64).interval[0] == pytest.approx(0.0, abs=1e-9) and Score(8, 16, 64, 64).interval[1] <= 1.0
    low, high = Score(2, 16, 32, 64).interval
    assert low == pytest.approx(1 - high) and 0.37 < low < 0.4
    assert torch.tensor(Score(8, 16, 8, 64).share) == Score(8, 16, 8, 64).chance
