"""What the example shows: progress bars, a table, a file of results, a plot. Does not know how results come about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.ballet.evaluation import Result, Score

Results = Mapping[str, Result]
"""By agent."""


def make_progress(console: Console) -> Progress:
    """Bars that say how long it takes."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def table(results: Results) -> Table:
    """Agents by settings: the share of right choices in %, and where it is with 95% confidence."""
    shown = Table(title="right choices in % (95% confidence)")
    shown.add_column("agent")
    settings = next(iter(results.values())).scores
    for score in settings:
        shown.add_column(f"{score.num_dancers} dancers, delay {score.delay}", justify="right")
    for agent, result in results.items():
        shown.add_row(agent, *map(_cell, result.scores))
    shown.add_row("chance", *(f"{100 * score.chance:.1f}" for score in settings))
    return shown


def _cell(score: Score) -> str:
    low, high = score.interval
    return f"{100 * score.share:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def save(results: Results, path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps({agent: asdict(result) for agent, result in results.items()}, indent=1) + "\n")


def load(path: Path) -> dict[str, Result]:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    return {agent: Result(**of | {"scores": [Score(**one) for one in of["scores"]]}) for agent, of in found.items()}


def draw(results: Results, path: Path) -> None:
    """As a picture. Needs the extra `plots`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.6))
    settings = next(iter(results.values())).scores
    width = 0.8 / len(results)
    for number, (agent, result) in enumerate(results.items()):
        of = result.scores
        places = [place + (number - (len(results) - 1) / 2) * width for place in range(len(of))]
        shares = [100 * score.share for score in of]
        errors = [[100 * abs(score.share - score.interval[side]) for score in of] for side in (0, 1)]
        axes.bar(places, shares, width, yerr=errors, label=agent, error_kw={"linewidth": 0.8})
    for place, score in enumerate(settings):
        axes.hlines(100 * score.chance, place - 0.45, place + 0.45, "black", "dashed", linewidth=0.8)
    axes.set_xticks(range(len(settings)), [f"{score.num_dancers} dancers\ndelay {score.delay}" for score in settings])
    axes.set_ylabel("right choices in %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=len(results), frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
