"""The plots of docs/benchmarks/: drawn from the figures beside them, and shown on the page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
PLOTS = PAGE.parent / "benchmarks"


def test_the_page_shows_every_plot() -> None:
    shown = set(re.findall(r"!\[[^\]]+\]\(benchmarks/([\w.]+)\)", PAGE.read_text()))
    assert shown == {path.name for path in PLOTS.glob("*.svg")} != set()


def test_the_figures_say_when_and_on_what() -> None:
    figures = json.loads((PLOTS / "plots.json").read_text())
    assert {"date", "cpu", "cores", "torch", "latency", "throughput"} <= figures.keys()
    assert not figures["quick"]
    assert len({len(series) for series in figures["latency"].values()}) == 1
    chunk_size = figures["shape"]["chunk_size"]
    uneven = [n for n in figures["latency"]["n"] if n % chunk_size]
    assert not uneven, "htm-pytorch pads and masks what is no whole chunk: unfair to it by several times"
    throughput = figures["throughput"]
    assert {len(runs) for runs in throughput["runs"].values()} == {len(throughput["connections"])}
    for svg in PLOTS.glob("*.svg"):
        assert figures["date"] in svg.read_text(), f"{svg.name} was drawn from other figures: make bench-plots"


def test_the_same_figures_give_the_same_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="of the extra `plots`")
    from bench.plots.draw import draw

    shutil.copy(PLOTS / "plots.json", tmp_path)
    figures = json.loads((tmp_path / "plots.json").read_text())
    first = {path.name: path.read_bytes() for path in draw(figures, tmp_path)}
    assert first.keys() == {path.name for path in PLOTS.glob("*.svg")}
    assert first == {path.name: path.read_bytes() for path in draw(figures, tmp_path)}
