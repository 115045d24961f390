"""Draws the figures as SVG with matplotlib, the same bytes from the same figures. Does not measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.hashsalt": "htm-service",  # ids that are the same on every run
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
COLOURS = {"htm-service": "#0a6c8f", "in process": "#5fb3c9", "other": "#8a8a8a", "naive": "#c4622d"}
"""Told apart by the markers as well, for those who do not see the colours."""


def draw(figures: dict[str, Any], directory: Path) -> list[Path]:
    """All plots into `directory`; what was drawn."""
    subtitle = f"{figures['cpu']}, {figures['cores']} cores, {figures['date']}"
    with mpl.rc_context(STYLE):
        drawn = {
            "latency": _latency(figures["latency"], subtitle),
            "throughput": _throughput(figures["throughput"], subtitle),
            "batches": _batches(figures["throughput"], subtitle),
        }
        paths = []
        for name, figure in drawn.items():
            paths.append(directory / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            # matplotlib ends lines with spaces, which git calls errors
            lines = paths[-1].read_text().splitlines()
            paths[-1].write_text("\n".join(line.rstrip() for line in lines) + "\n")
    return paths


def _latency(found: dict[str, Any], subtitle: str) -> Figure:
    figure, axes = _axes("One attend, by the length of its session", subtitle, "tokens in the session", "median, ms")
    for key, name, colour, marker in (
        ("htm_pytorch_ms", "htm-pytorch", "naive", "^"),
        ("served_ms", "htm-service, over HTTP", "htm-service", "o"),
        ("in_process_ms", "htm-service, in process", "in process", "s"),
    ):
        axes.plot(found["n"], found[key], marker=marker, color=COLOURS[colour], label=name)
    axes.set(xscale="log", yscale="log")
    axes.legend()
    return figure


def _throughput(found: dict[str, Any], subtitle: str) -> Figure:
    figure, axes = _axes("Served attends, by connections", subtitle, "connections", "answers per second")
    for key, name, colour, marker in (
        ("echo", "an echo of the same app", "other", "s"),
        ("htm-service", "htm-service", "htm-service", "o"),
        ("naive", "the naive service", "naive", "^"),
    ):
        rates = [run["per_s"] for run in found["runs"][key]]
        axes.plot(found["connections"], rates, marker=marker, color=COLOURS[colour], label=name)
    axes.set(yscale="log")
    _connections(axes, found)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.33))  # between the lines
    return figure


def _batches(found: dict[str, Any], subtitle: str) -> Figure:
    figure, axes = _axes("Queries in one batch, by connections", subtitle, "connections", "mean size of a batch")
    sizes = [run["mean_batch"] for run in found["runs"]["htm-service"]]
    axes.plot(found["connections"], sizes, marker="o", color=COLOURS["htm-service"])
    _connections(axes, found)
    axes.set_ylim(bottom=0)
    return figure


def _axes(title: str, subtitle: str, across: str, up: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=12)
    axes.set_title(subtitle, fontsize=8, color="#666666")
    axes.set(xlabel=across, ylabel=up)
    return figure, axes


def _connections(axes: Any, found: dict[str, Any]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(found["connections"], [str(number) for number in found["connections"]])
