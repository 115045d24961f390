"""`python -m examples.ballet`: learn through a server, push the weights, and measure there, beside other memories."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from htm_client.torch import RemoteHTMAttention
from rich.console import Console
from safetensors.torch import load_file, save_file

from examples.ballet import learner, report
from examples.ballet.agents import CHUNK_SIZE, DIM, LOCAL, Agent, Encoder, make_htm
from examples.ballet.episodes import Stage
from examples.ballet.evaluation import SETTINGS, Score, evaluate
from examples.ballet.learner import Read
from examples.ballet.memory import Memory

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights.safetensors"
RESULTS = HERE / "results.json"
HTM = "HTM on the server"
NUM_ENCODER, NUM_AGENT, NUM_BATCHES = 600, 400, 4
SEED, SEED_OF_TESTS = 0, 1


class Ballet:
    """A run of the example: `scale` of 1 is all of it, less is fewer iterations and fewer settings."""

    def __init__(self, memory: Memory, console: Console, scale: float = 1.0) -> None:
        self._memory, self._console = memory, console
        self._num_encoder, self._num_agent = (max(3, round(scale * number)) for number in (NUM_ENCODER, NUM_AGENT))
        self._num_batches = max(1, round(scale * NUM_BATCHES))
        self.settings: Sequence[tuple[int, int]] = SETTINGS if scale >= 1 else SETTINGS[:1]

    def encoder(self) -> Encoder:
        """One that has learned to tell what it sees."""
        torch.manual_seed(SEED)
        encoder, number = Encoder(), self._num_encoder
        with report.make_progress(self._console) as progress:
            iterations = progress.track(range(number), description="the encoder learns")
            learner.train_encoder(encoder, Stage(SEED), iter(iterations), number)
        return encoder

    def train(self, name: str, agent: Agent, read: Read) -> None:
        """Teach one agent."""
        number, began = self._num_agent, time.monotonic()
        with report.make_progress(self._console) as progress:
            iterations = progress.track(range(number), description=f"{name} learns")
            right = learner.train(agent, read, Stage(SEED), iter(iterations), number)
        size = sum(parameter.numel() for parameter in agent.reader.parameters())
        took = time.monotonic() - began
        self._console.print(f"{name}, {size:,} parameters: {right:.1%} right at the end of {took:.0f} s of training")

    def scores(self, name: str, agent: Agent, read: Read) -> list[Score]:
        """Measure one agent."""
        found = []
        stage = Stage(SEED_OF_TESTS)
        for num_dancers, delay in self.settings:
            with report.make_progress(self._console) as progress:
                batches = progress.track(range(self._num_batches), description=f"{name}: {num_dancers}, {delay}")
                found.append(evaluate(agent, read, stage, num_dancers, delay, iter(batches)))
        return found

    def run(self, weights: Path | None) -> dict[str, list[Score]]:
        """Train all, or take the HTM agent from `weights` and train none; the scores by agent."""
        block = make_htm()
        agent = Agent(Encoder(), block)
        if weights is not None:
            agent.load_state_dict(load_file(weights))
        else:
            agent.encoder = self.encoder()
            attention = RemoteHTMAttention(self._memory.client, block)
            self.train(HTM, agent, learner.remote_reader(agent, self._memory, attention))
        self._memory.push(block)
        scores = {HTM: self.scores(HTM, agent, learner.pushed_reader(agent, self._memory))}
        if weights is None:
            self.trained = agent
            for name, (make, width) in LOCAL.items():
                torch.manual_seed(SEED)
                other = Agent(copy.deepcopy(agent.encoder), make(), width)
                self.train(name, other, learner.local_reader(other))
                scores[name] = self.scores(name, other, learner.local_reader(other))
        return scores


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="make ballet", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a hundredth of it, to see it run")
    parser.add_argument("--weights", type=Path, help="train nothing: measure these weights")
    parser.add_argument("--save", action="store_true", help="keep weights, results and plot in the repository")
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(1)  # the server is there, too
    with Memory(DIM, CHUNK_SIZE) as memory:
        ballet = Ballet(memory, console, 0.01 if arguments.short else 1.0)
        scores = ballet.run(arguments.weights)
    console.print(report.table(scores))
    if arguments.save and arguments.weights is None:
        save_file(ballet.trained.state_dict(), WEIGHTS)
        report.save(scores, RESULTS)
        report.draw(scores, HERE.parents[1] / "docs" / "ballet.svg")


if __name__ == "__main__":
    main()
