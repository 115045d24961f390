"""What a benchmark found, beside its bar, and the table of it all."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Figure:
    """One of S1 to S22, A1, C1 and C2: `figure` must be at least `bar`, or, with `at_most`, at most."""

    id: str
    what: str
    figure: float
    bar: float
    at_most: bool = False
    unit: str = "x"
    measured: dict[str, Any] = field(default_factory=dict)
    """What the figure was made of, with units in the names."""

    @property
    def is_met(self) -> bool:
        """Whether the bar is reached."""
        return self.figure <= self.bar if self.at_most else self.figure >= self.bar

    def line(self) -> str:
        """What it is, beside its bar."""
        sign = "<=" if self.at_most else ">="
        verdict = "met" if self.is_met else "MISSED"
        return f"{self.id:4} {self.what:58} {_short(self.figure):>9} {sign}{_short(self.bar):>7}  {verdict}"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_figures(figures: Sequence[Figure], **conditions: Any) -> None:
    """A table, then one JSON line."""
    print(f"{'':4} {'what':58} {'figure':>9} {'bar':>9}  verdict")
    for figure in figures:
        print(figure.line())
        measured = ", ".join(f"{name} {_short(value)}" for name, value in figure.measured.items())
        if measured:
            print(f"{'':5}{measured}")
    print(
        json.dumps(
            {
                **machine(),
                **conditions,
                "figures": [{**asdict(figure), "is_met": figure.is_met} for figure in figures],
            }
        )
    )


def say(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def _cpu_name() -> str:
    with Path("/proc/cpuinfo").open() as file:
        return next((line.split(": ")[1].strip() for line in file if line.startswith("model name")), "unknown")
