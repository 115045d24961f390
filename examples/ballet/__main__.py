"""`python -m examples.ballet`: learn through a server, push the weights, and measure there, beside other memories."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from htm_client.torch import RemoteHTMAttention
from rich.console import Console
from safetensors.torch import load_file, save_file

from examples.ballet import learner, report
from examples.ballet.agents import CHUNK_SIZE, DIM, LOCAL, Agent, Encoder, make_htm
from examples.ballet.episodes import Stage
from examples.ballet.evaluation import CHOSEN_ON, SETTINGS, Result, Score, evaluate
from examples.ballet.learner import Pupil, Read
from examples.ballet.memory import Memory

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights.safetensors"
RESULTS = HERE / "results.json"
PLOT = HERE.parents[1] / "docs" / "ballet.svg"
HTM = "HTM on the server"
NUM_ENCODER, NUM_BATCHES = 600, 4
NUM_UPDATES = {HTM: 400, "GRU": 800, "mean": 1200, "full attention": 800}
"""As many as an agent makes, at all its rates together, in no more time than HTM learns for."""
SEED, SEED_OF_TESTS, SEED_OF_CHOICE = 0, 1, 2

Trained = tuple[Pupil, Result]
"""The best, and what is known of it before it is measured."""


class Ballet:
    """A run of the example: `scale` of 1 is all of it, less is fewer iterations and fewer settings."""

    def __init__(self, memory: Memory, console: Console, scale: float = 1.0) -> None:
        self._memory, self._console, self._scale = memory, console, scale
        self.trained: Agent | None = None
        self.settings: Sequence[tuple[int, int]] = SETTINGS if scale >= 1 else SETTINGS[:1]

    def _scaled(self, number: int, at_least: int) -> int:
        return max(at_least, round(self._scale * number))

    def encoder(self) -> Encoder:
        """One that has learned to tell what it sees."""
        torch.manual_seed(SEED)
        encoder, number = Encoder(), self._scaled(NUM_ENCODER, 3)
        with report.make_progress(self._console) as progress:
            iterations = progress.track(range(number), description="the encoder learns")
            learner.train_encoder(encoder, Stage(SEED), iter(iterations), number)
        return encoder.requires_grad_(False)

    def train(
        self, name: str, encoder: Encoder, make: Callable[[float, int], Pupil], rates: Sequence[float]
    ) -> Trained:
        """Teach an agent at each of the rates, from the same episodes, and keep the one that is right most often."""
        number, began = self._scaled(NUM_UPDATES[name], 3), time.monotonic()
        pupils = [make(rate, number) for rate in rates]
        with report.make_progress(self._console) as progress:
            iterations = progress.track(range(number), description=f"{name} learns")
            learner.train(encoder, pupils, Stage(SEED), iter(iterations))
        took = time.monotonic() - began
        stage_of = [Stage(SEED_OF_CHOICE) for _ in pupils]  # the same episodes for each
        shares = {
            f"{pupil.rate:g}": self.score(name, pupil.agent, pupil.read, stage, CHOSEN_ON).share
            for pupil, stage in zip(pupils, stage_of, strict=True)
        }
        result = Result([], number, pupils[0].agent.reader_size, shares)
        best = next(pupil for pupil in pupils if f"{pupil.rate:g}" == result.rate)
        self._console.print(f"{name}, {result.parameters:,} parameters, {took:.0f} s: right at the rates {shares}")
        return best, result

    def score(self, name: str, agent: Agent, read: Read, stage: Stage, setting: tuple[int, int]) -> Score:
        """Measure an agent in one setting."""
        with report.make_progress(self._console) as progress:
            batches = range(self._scaled(NUM_BATCHES, 1))
            shown = progress.track(batches, description=f"{name}: {setting[0]}, {setting[1]}")
            return evaluate(agent, read, stage, *setting, iter(shown))

    def scores(self, name: str, agent: Agent, read: Read) -> list[Score]:
        """Measure an agent in all of them."""
        stage = Stage(SEED_OF_TESTS)
        return [self.score(name, agent, read, stage, setting) for setting in self.settings]

    def _pushed(self, agent: Agent) -> list[Score]:
        """The scores of an HTM agent through attends of the server."""
        self._memory.push(agent.reader)
        return self.scores(HTM, agent, learner.pushed_reader(self._memory))

    def run(self, names: Collection[str] = tuple(NUM_UPDATES), weights: Path | None = None) -> dict[str, Result]:
        """Train those named and measure them; the HTM agent is kept in `trained`.

        With `weights` it is taken from there, and the others learn from its encoder.
        """
        results: dict[str, Result] = {}
        if weights is None:
            agent = Agent(self.encoder(), make_htm())
        else:
            agent = Agent(Encoder().requires_grad_(False), make_htm())
            agent.load_state_dict(load_file(weights))
        if HTM in names:
            read = learner.remote_reader(self._memory, RemoteHTMAttention(self._memory.client, agent.reader))
            result = Result([], NUM_UPDATES[HTM], agent.reader_size, {})
            if weights is None:
                _, result = self.train(HTM, agent.encoder, partial(Pupil, agent, read), [learner.RATE])
            results[HTM] = replace(result, scores=self._pushed(agent))
            self.trained = agent
        for name in [name for name in LOCAL if name in names]:
            best, result = self.train(name, agent.encoder, partial(_make_local, name, agent.encoder), learner.RATES)
            results[name] = replace(result, scores=self.scores(name, best.agent, best.read))
        return results


def _make_local(name: str, encoder: Encoder, rate: float, num_updates: int) -> Pupil:
    torch.manual_seed(SEED)
    make, width = LOCAL[name]
    agent = Agent(encoder, make(), width)
    return Pupil(agent, agent.reader, rate, num_updates)


def _save(results: dict[str, Result], trained: Agent | None) -> None:
    """Keep what is new; results of agents that did not run stay."""
    if trained is not None:
        save_file(trained.state_dict(), WEIGHTS)
    kept = report.load(RESULTS) if RESULTS.exists() else {}
    found = kept | results
    report.save({name: found[name] for name in NUM_UPDATES if name in found}, RESULTS)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="make ballet", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a hundredth of it, to see it run")
    parser.add_argument("--weights", type=Path, help="of an HTM agent: it does not learn, the others only when named")
    parser.add_argument("--agents", nargs="+", choices=NUM_UPDATES, help="leave others out")
    parser.add_argument("--save", action="store_true", help="keep weights and results in the repository")
    parser.add_argument("--draw", action="store_true", help="draw the results that are kept, and do nothing else")
    arguments = parser.parse_args()
    if arguments.draw:
        report.draw(report.load(RESULTS), PLOT)
        return
    console = Console()
    torch.set_num_threads(1)  # the server is there, too
    with Memory(DIM, CHUNK_SIZE) as memory:
        ballet = Ballet(memory, console, 0.01 if arguments.short else 1.0)
        all_of_them = [*NUM_UPDATES] if arguments.weights is None else [HTM]
        results = ballet.run(arguments.agents or all_of_them, arguments.weights)
    console.print(report.table(results))
    if arguments.save:
        _save(results, ballet.trained)


if __name__ == "__main__":
    main()
