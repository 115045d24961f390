"""`make bench-plots`: measures, keeps the figures as JSON in docs/benchmarks/, and draws them beside it."""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

from bench.figures import machine, say
from bench.plots import measure
from bench.plots.draw import draw
from bench.scene import CHUNK_SIZE, DIM, HEADS, TOP_K, make_scene

FIGURES = "plots.json"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-plots", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look at fewer points, into build/benchmarks")
    parser.add_argument("--draw-only", action="store_true", help="draw the figures that are there")
    parser.add_argument("--directory", type=Path, help="default: docs/benchmarks")
    options = parser.parse_args()
    directory = options.directory or Path("build/benchmarks" if options.quick else "docs/benchmarks")
    directory.mkdir(parents=True, exist_ok=True)
    if not options.draw_only:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            stage = make_scene(Path(name))
            found = {"latency": measure.latency(stage, options.quick)}
        with tempfile.TemporaryDirectory() as name:  # a server without the long sessions
            found["throughput"] = measure.throughput(make_scene(Path(name)), options.quick)
        conditions = {
            "date": datetime.date.today().isoformat(),
            "quick": options.quick,
            "seconds": round(time.perf_counter() - began),
            "shape": {"dim": DIM, "heads": HEADS, "top_k": TOP_K, "chunk_size": CHUNK_SIZE},
        }
        measure.write(directory / FIGURES, {**machine(), **conditions, **found})
    for path in draw(json.loads((directory / FIGURES).read_text()), directory):
        say(f"{path}")


if __name__ == "__main__":
    main()
