"""What the example shows: progress bars, a table, a file of results, a plot. Does not know how results come about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.ballet.evaluation import Score

Scores = Mapping[str, Sequence[Score]]
"""By agent, one for each setting."""


def make_progress(console: Console) -> Progress:
    """Bars that say how long it takes."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def table(scores: Scores) -> Table:
    """Agents by settings: the share of right choices in %, and where it is with 95% confidence."""
    shown = Table(title="right choices in % (95% confidence)")
    shown.add_column("agent")
    settings = next(iter(scores.values()))
    for score in settings:
        shown.add_column(f"{score.num_dancers} dancers, delay {score.delay}", justify="right")
    for agent, of_agent in scores.items():
        shown.add_row(agent, *map(_cell, of_agent))
    shown.add_row("chance", *(f"{100 * score.chance:.1f}" for score in settings))
    return shown


def _cell(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def save(scores: Scores, path: Path) -> None:
    """As JSON."""
    found = {agent: [asdict(score) for score in of_agent] for agent, of_agent in scores.items()}
    path.write_text(json.dumps(found, indent=1) + "\n")


def load(path: Path) -> dict[str, list[Score]]:
    """What `save` wrote."""
    return {agent: [Score(**score) for score in of] for agent, of in json.loads(path.read_text()).items()}


def draw(scores: Scores, path: Path) -> None:
    """As a picture. Needs the extra `plots`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6))
    settings = next(iter(scores.values()))
    width = 0.8 / len(scores)
    for number, (agent, of) in enumerate(scores.items()):
        places = [place + (number - (len(scores) - 1) / 2) * width for place in range(len(of))]
        shares = [100 * score.share for score in of]
        errors = [[100 * abs(score.share - score.interval[side]) for score in of] for side in (0, 1)]
        axes.bar(places, shares, width, yerr=errors, label=agent, error_kw={"linewidth": 0.8})
    for place, score in enumerate(settings):
        axes.hlines(100 * score.chance, place - 0.45, place + 0.45, "black", "dashed", linewidth=0.8)
    axes.set_xticks(range(len(settings)), [f"{score.num_dancers} dancers\ndelay {score.delay}" for score in settings])
    axes.set_ylabel("right choices in %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(scores), frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
